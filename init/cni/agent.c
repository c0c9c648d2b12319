// SPDX-License-Identifier: Apache-2.0
#include "agent.h"

#include <arpa/inet.h>
#include <errno.h>
#include <poll.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

enum {
	PAUSE_MS = 50,		/* between two attempts */
	BREAKS_MAX = 3,		/* how often it may go away in the middle */
	HEADER = 8,		/* magic and length */
};

enum outcome {
	ANSWERED,
	NOT_THERE,
	BUSY,
	BROKEN_OFF,
	SILENT,
};

long long now_ms(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return now.tv_sec * 1000LL + now.tv_nsec / 1000000;
}

bool wait_for(int descriptor, short events, long long until)
{
	for (;;) {
		struct pollfd wanted = { .fd = descriptor, .events = events };
		long long left = until - now_ms();
		int ready = poll(&wanted, 1, left > 0 ? (int)left : 0);

		if (ready > 0)
			return true;
		if (ready == 0 && left <= 0)
			return false;
		if (ready < 0 && errno != EINTR)
			return false;
	}
}

static void sleep_ms(long ms)
{
	struct timespec pause = { ms / 1000, ms % 1000 * 1000000 };

	while (nanosleep(&pause, &pause) && errno == EINTR)
		;
}

static enum outcome say(enum outcome outcome, char why[WHY_MAX], const char *path, const char *what)
{
	snprintf(why, WHY_MAX, "%s: %s", path, what);
	return outcome;
}

/* Sends all of it, unless the agent hangs up before. */
static bool send_all(int connection, const char *bytes, size_t length, long long until)
{
	while (length) {
		ssize_t sent = send(connection, bytes, length, MSG_DONTWAIT | MSG_NOSIGNAL);

		if (sent >= 0) {
			bytes += sent;
			length -= sent;
		} else if (errno == EAGAIN || errno == EINTR) {
			if (!wait_for(connection, POLLOUT, until))
				return false;
		} else {
			return false;
		}
	}
	return true;
}

/* Reads until the agent hangs up; how much, or -1 when it does not in time, or says too much. */
static ssize_t receive_all(int connection, char *out, size_t size, long long until)
{
	size_t have = 0;

	while (have < size) {
		ssize_t got;

		if (!wait_for(connection, POLLIN, until))
			return -1;
		got = recv(connection, out + have, size - have, MSG_DONTWAIT);
		if (got == 0)
			return have;
		if (got > 0)
			have += got;
		else if (errno != EAGAIN && errno != EINTR)
			return have;
	}
	return -1;
}

static enum outcome talk(int connection, const char *path, const char *body, size_t length, long long until,
			 struct span *answer, char why[WHY_MAX])
{
	static char buffer[ANSWER_MAX];
	char header[HEADER] = { 'T', 'G', 'C', '1' };
	unsigned int size = htonl(length);
	ssize_t have;

	memcpy(header + 4, &size, sizeof(size));
	/* An agent that hangs up early may have said why. */
	if (send_all(connection, header, sizeof(header), until))
		send_all(connection, body, length, until);
	have = receive_all(connection, buffer, sizeof(buffer), until);
	if (have < 0 && now_ms() >= until)
		return say(SILENT, why, path, "there was no answer in time");
	if (have >= 0) {
		*answer = json_whole(buffer, have);
		if (json_is_object(*answer))
			return ANSWERED;
	}
	return say(BROKEN_OFF, why, path, have ? "what was answered is not an answer" : "it hung up in the middle");
}

static enum outcome ask_once(const char *path, const char *body, size_t length, long long until, struct span *answer,
			     char why[WHY_MAX])
{
	struct sockaddr_un address = { .sun_family = AF_UNIX };
	int connection = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
	enum outcome outcome;

	if (connection < 0)
		return say(NOT_THERE, why, path, strerror(errno));
	strncpy(address.sun_path, path, sizeof(address.sun_path) - 1);
	if (connect(connection, (struct sockaddr *)&address, sizeof(address)))
		/* EAGAIN: more wait for it than it takes at a time. */
		outcome = say(errno == EAGAIN ? BUSY : NOT_THERE, why, path, strerror(errno));
	else
		outcome = talk(connection, path, body, length, until, answer, why);
	close(connection);
	return outcome;
}

struct span agent_ask(const char *path, const char *body, size_t length, struct patience patience, char why[WHY_MAX])
{
	long long until = now_ms() + patience.timeout_ms;
	long long there_until = now_ms() + patience.wait_ms;
	struct span answer = { NULL, 0 };
	int breaks = 0;

	for (;;) {
		switch (ask_once(path, body, length, until, &answer, why)) {
		case ANSWERED:
			return answer;
		case SILENT:
			return (struct span){ NULL, 0 };
		case BROKEN_OFF:
			if (++breaks > BREAKS_MAX)
				return (struct span){ NULL, 0 };
			there_until = now_ms() + patience.wait_ms;
			break;
		case BUSY:
			there_until = until;
			break;
		case NOT_THERE:
			break;
		}
		if (now_ms() + PAUSE_MS > (there_until < until ? there_until : until))
			return (struct span){ NULL, 0 };
		sleep_ms(PAUSE_MS);
	}
}
