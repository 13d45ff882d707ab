/*
 * Events, one JSON object a line on stdout. All have "event"; these are without more:
 *
 *   source       running, resumed, done
 *   both         error (the end, except of a running destination), refused (a command),
 *                disconnected: "message"
 *   source       failed (gmemd-source gave up): "message"
 *   destination  abandoned: "message"
 *
 * The others are put together where they happen: filled, paused; ready, first-instruction, done;
 * mismatch, verified.
 */
#ifndef GMEMD_VMM_REPORT_H
#define GMEMD_VMM_REPORT_H

void report(const char *event);
void report_message(const char *event, const char *message);

#endif
