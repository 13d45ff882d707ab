"""`make soak`: many small migrations, each with a fault at a random byte, each checked page by page."""
