"""What is not needed to run gmemd: demo, replay harness, reference VMM, benchmarks, lab kernel."""
