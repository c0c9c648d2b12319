// SPDX-License-Identifier: Apache-2.0
#include "agent.h"

#include <errno.h>
#include <poll.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum {
	ANSWER_MAX = 64 << 10,
	PAUSE_MS = 50,		/* between two attempts */
	BREAKS_MAX = 3,		/* how often it may go away in the middle */
};

long long now_ms(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return now.tv_sec * 1000LL + now.tv_nsec / 1000000;
}

bool wait_for(int descriptor, short event, long long until)
{
	struct pollfd wanted = { .fd = descriptor, .events = event };
	long long left;
	int ready;

	do {
		left = until - now_ms();
		ready = left > 0 ? poll(&wanted, 1, left) : 0;
	} while (ready < 0 && errno == EINTR);
	return ready > 0;
}

/* What the agent answers until it hangs up; none when that is no answer, or does not come in time. */
static struct span talk(int connection, struct span request, long long until, const char **why)
{
	static char answer[ANSWER_MAX + 1];
	size_t length = 0;
	ssize_t moved = 0;
	struct span object;

	while (request.length && moved >= 0 && wait_for(connection, POLLOUT, until)) {
		moved = send(connection, request.at, request.length, MSG_NOSIGNAL);
		request.at += moved > 0 ? moved : 0;
		request.length -= moved > 0 ? moved : 0;
	}
	/* Also when not all could be sent: an agent that hangs up early may have said why. */
	do {
		*why = "there was no answer in time";
		if (!wait_for(connection, POLLIN, until))
			return (struct span){ NULL, 0 };
		moved = recv(connection, answer + length, ANSWER_MAX - length, 0);
		length += moved > 0 ? moved : 0;
	} while (moved > 0);
	answer[length] = '\0';
	*why = length ? "what was answered is not an answer" : "it hung up in the middle";
	object = json_whole(answer, length);
	return json_is(object, '{') ? object : (struct span){ NULL, 0 };
}

struct span agent_ask(const struct sockaddr_un *address, struct span request, struct patience patience,
		      const char **why)
{
	long long until = now_ms() + patience.timeout_ms;
	long long there_until = now_ms() + patience.wait_ms;
	struct span answer = { NULL, 0 };
	int breaks = 0;

	for (;;) {
		int connection = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);

		if (connection >= 0 && !connect(connection, (const struct sockaddr *)address, sizeof(*address))) {
			answer = talk(connection, request, until, why);
			there_until = ++breaks > BREAKS_MAX ? 0 : now_ms() + patience.wait_ms;
		} else {
			*why = strerror(errno);
			/* More wait for it than it takes at a time. */
			if (errno == EAGAIN)
				there_until = until;
		}
		/* Before anything is printed: it may have the number of a standard output that was closed. */
		close(connection);
		if (answer.at || now_ms() + PAUSE_MS > (there_until < until ? there_until : until))
			return answer;
		poll(NULL, 0, PAUSE_MS);
	}
}
