/* SPDX-License-Identifier: Apache-2.0 */
/* Asks the node's agent over its unix socket, in the language of agent/tidegate/workloads/cni.py. */
#ifndef TIDEGATE_AGENT_H
#define TIDEGATE_AGENT_H

#include <sys/un.h>

#include "json.h"

struct patience {
	long wait_ms;		/* for an agent that is not there, or goes away in the middle */
	long timeout_ms;	/* for everything */
};

/* Milliseconds of a clock that nobody sets. */
long long now_ms(void);

/* Waits for an event of poll(2) on a descriptor until a time of now_ms; false when that is over. */
bool wait_for(int descriptor, short event, long long until);

/*
 * The agent's answer, a JSON object; none when it gave none, and then `why` is a clause that says so. An agent that
 * goes away in the middle is asked again: it does nothing twice.
 */
struct span agent_ask(const struct sockaddr_un *address, struct span request, struct patience patience,
		      const char **why);

#endif
