/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Asks the node's agent over its unix socket: the request that agent/tidegate/workloads/cni.py describes, and what
 * came back, as far as it is an answer.
 */
#ifndef TIDEGATE_AGENT_H
#define TIDEGATE_AGENT_H

#include <stdbool.h>
#include <stddef.h>

#include "json.h"

enum {
	REQUEST_MAX = 256 << 10,	/* MAX_REQUEST_BYTES there */
	ANSWER_MAX = 64 << 10,
	WHY_MAX = 512,
};

/* Milliseconds of a clock that nobody sets. */
long long now_ms(void);

/* Waits for an event of poll(2) on a descriptor until a time of now_ms. */
bool wait_for(int descriptor, short events, long long until);

struct patience {
	long wait_ms;		/* for an agent that is not there, or goes away in the middle */
	long timeout_ms;	/* for everything */
};

/*
 * The agent's answer, a JSON object; none when it gave none, and then `why` is a clause that says so. An agent that
 * goes away in the middle is asked again: it does nothing twice.
 */
struct span agent_ask(const char *path, const char *body, size_t length, struct patience patience, char why[WHY_MAX]);

#endif
