// SPDX-License-Identifier: Apache-2.0
/*
 * The CNI plugin: hands a call to the node's agent, and prints one JSON object or nothing, whatever happens. It knows
 * nothing of redirection and needs nothing of the host but the agent's socket. What it prints it has made itself, but
 * for the result of the plugins before it, which it passes on as it came.
 *
 * Without an agent: what is taken away (DEL) is gone with its namespace; what starts (ADD) fails, unless the network
 * configuration says otherwise, or the pod's namespace is one that always starts.
 */
#include <errno.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/un.h>
#include <unistd.h>

#include "agent.h"
#include "json.h"

enum {
	INPUT_MAX = 16 << 20,
	INPUT_MS = 10 * 1000,
	SECONDS_MAX = 600,
	SOCKET_MAX = sizeof(((struct sockaddr_un *)0)->sun_path),
	ALWAYS_TIMEOUT_MS = 2 * 1000,	/* for an agent that does not answer, where it need not */
};

/* SPEC.md of CNI, "Well-known Error Codes" */
enum {
	INCOMPATIBLE_VERSION = 1,
	INVALID_ENVIRONMENT = 4,
	IO_FAILURE = 5,
	DECODING = 6,
	INVALID_CONFIG = 7,
	TRY_AGAIN = 11,
	NOT_AVAILABLE = 50,
};

enum command {
	ADD,
	DEL,
	CHECK,
	STATUS,
	GC,
};

/* Versions of the specification, the older first. */
static const char *const versions[] = { "0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0" };

enum {
	VERSIONS = sizeof(versions) / sizeof(*versions),
	NEWEST = VERSIONS - 1,
};

static const struct {
	const char *name;
	int since;		/* index of versions */
} commands[] = {
	[ADD] = { "ADD", 0 },
	[DEL] = { "DEL", 0 },
	[CHECK] = { "CHECK", 2 },
	[STATUS] = { "STATUS", 4 },
	[GC] = { "GC", 4 },
};

/* What the network configuration says to this plugin, below "tidegate". */
struct settings {
	char socket[SOCKET_MAX];
	bool open;		/* on_agent_absent */
	bool always;		/* always_start has the pod's namespace */
	long wait_s;
	long timeout_s;
};

static int version = NEWEST;

static void put_text(const char *text)
{
	putchar('"');
	for (; *text; text++) {
		if (*text == '"' || *text == '\\')
			putchar('\\');
		putchar(*text < ' ' || *text > '~' ? '?' : *text);
	}
	putchar('"');
}

static void put_span(struct span span)
{
	fwrite(span.at, 1, span.length, stdout);
}

/* Ends the program; with an error if not all of the output was taken. */
static _Noreturn void finish(int status)
{
	exit(fflush(stdout) ? 1 : status);
}

static _Noreturn void fail(int code, const char *message, const char *details)
{
	printf("{\"cniVersion\":\"%s\",\"code\":%d,\"msg\":", versions[version], code);
	put_text(message);
	if (details && *details) {
		printf(",\"details\":");
		put_text(details);
	}
	putchar('}');
	finish(1);
}

static const char *environment(const char *name)
{
	const char *value = getenv(name);

	return value ? value : "";
}

static void print_versions(void)
{
	printf("{\"cniVersion\":\"%s\",\"supportedVersions\":[", versions[NEWEST]);
	for (int i = 0; i < VERSIONS; i++)
		printf("%s\"%s\"", i ? "," : "", versions[i]);
	printf("]}");
}

static enum command command_named(const char *name)
{
	for (enum command command = ADD; command <= GC; command++)
		if (!strcmp(name, commands[command].name))
			return command;
	fail(INVALID_ENVIRONMENT, "CNI_COMMAND is missing or wrong", "expected ADD, DEL, CHECK, STATUS, GC or VERSION");
}

static struct span read_input(void)
{
	long long until = now_ms() + INPUT_MS;
	size_t room = 64 << 10, have = 0;
	char *text = malloc(room);

	for (;;) {
		ssize_t got;

		if (!text)
			fail(IO_FAILURE, "there is no memory for the network configuration", NULL);
		if (!wait_for(STDIN_FILENO, POLLIN, until))
			fail(IO_FAILURE, "the network configuration does not end on standard input", NULL);
		got = read(STDIN_FILENO, text + have, room - have);
		if (got == 0)
			return (struct span){ text, have };
		if (got < 0 && errno != EINTR && errno != EAGAIN)
			fail(IO_FAILURE, "the network configuration cannot be read from standard input", strerror(errno));
		have += got > 0 ? got : 0;
		if (have == INPUT_MAX)
			fail(DECODING, "the network configuration is too large", NULL);
		if (have == room)
			text = realloc(text, room *= 2);
	}
}

static int version_of(struct span config)
{
	struct span said = json_member(config, "cniVersion");

	for (int i = 0; i < VERSIONS; i++)
		if (json_equals(said, versions[i], strlen(versions[i])))
			return i;
	fail(INCOMPATIBLE_VERSION, "the network configuration is of another version of CNI",
	     "cniVersion: expected 0.3.0, 0.3.1, 0.4.0, 1.0.0 or 1.1.0");
}

/* The value of a pair in CNI_ARGS; none where there is no such pair. */
static struct span argument(const char *arguments, const char *name)
{
	size_t length = strlen(name);

	while (*arguments) {
		size_t pair = strcspn(arguments, ";");

		if (!strncmp(arguments, name, length) && arguments[length] == '=')
			return (struct span){ arguments + length + 1, pair - length - 1 };
		arguments += pair;
		arguments += *arguments == ';';
	}
	return (struct span){ NULL, 0 };
}

static _Noreturn void fail_field(const char *field, const char *expected)
{
	char details[128];

	snprintf(details, sizeof(details), "tidegate.%s: expected %s", field, expected);
	fail(INVALID_CONFIG, "the plugin's network configuration is wrong", details);
}

static void read_seconds(struct span section, const char *field, long *seconds)
{
	struct span value = json_member(section, field);

	if (value.at && !json_number(value, SECONDS_MAX, seconds))
		fail_field(field, "seconds, 0 to 600");
}

static bool always_starts(struct span section, struct span namespace)
{
	static const char by_default[] = "[\"kube-system\",\"tidegate-system\"]";
	struct span names = json_member(section, "always_start");

	if (!names.at)
		names = json_whole(by_default, sizeof(by_default) - 1);
	if (*names.at != '[')
		fail_field("always_start", "a list of namespaces");
	if (!namespace.length)
		return false;
	for (struct span name = json_first(names); name.at; name = json_next(names, name))
		if (json_equals(name, namespace.at, namespace.length))
			return true;
	return false;
}

static struct settings read_settings(struct span config)
{
	struct settings settings = { .socket = "/run/tidegate/cni.sock", .wait_s = 3, .timeout_s = 30 };
	struct span section = json_member(config, "tidegate"), value;

	if (section.at && !json_is_object(section))
		fail(INVALID_CONFIG, "the plugin's network configuration is wrong", "tidegate: expected an object");
	value = json_member(section, "socket");
	if (value.at && !json_copy(value, settings.socket, sizeof(settings.socket)))
		fail_field("socket", "a path of at most 107 bytes");
	value = json_member(section, "on_agent_absent");
	settings.open = json_equals(value, "open", 4);
	if (value.at && !settings.open && !json_equals(value, "fail", 4))
		fail_field("on_agent_absent", "fail or open");
	read_seconds(section, "wait_s", &settings.wait_s);
	read_seconds(section, "timeout_s", &settings.timeout_s);
	settings.always = always_starts(section, argument(environment("CNI_ARGS"), "K8S_POD_NAMESPACE"));
	return settings;
}

/* The result of the plugins before this one; none without, or with null. */
static struct span previous_result(struct span config)
{
	struct span previous = json_member(config, "prevResult");

	if (json_is_null(previous))
		return (struct span){ NULL, 0 };
	if (previous.at && !json_is_object(previous))
		fail(INVALID_CONFIG, "the network configuration is wrong", "prevResult: expected an object");
	return previous;
}

/* What is sent to the agent: the environment, each variable with its zero, and the configuration without prevResult. */
static char *request(struct span config, struct span previous, size_t *length)
{
	static const char *const names[] = { "CNI_COMMAND", "CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME", "CNI_ARGS" };
	static const char nothing[] = "null";
	struct span head = config, tail = { NULL, 0 };
	size_t needed = config.length + sizeof(nothing), at = 0;
	char *body;

	if (previous.at) {
		head.length = previous.at - config.at;
		tail.at = previous.at + previous.length;
		tail.length = config.length - head.length - previous.length;
	}
	for (size_t i = 0; i < sizeof(names) / sizeof(*names); i++)
		needed += strlen(environment(names[i])) + 1;
	body = malloc(needed);
	if (!body)
		fail(IO_FAILURE, "there is no memory for the request to the agent", NULL);
	for (size_t i = 0; i < sizeof(names) / sizeof(*names); i++) {
		const char *value = environment(names[i]);

		memcpy(body + at, value, strlen(value) + 1);
		at += strlen(value) + 1;
	}
	memcpy(body + at, head.at, head.length);
	at += head.length;
	if (previous.at) {
		memcpy(body + at, nothing, sizeof(nothing) - 1);
		at += sizeof(nothing) - 1;
		memcpy(body + at, tail.at, tail.length);
		at += tail.length;
	}
	if (at > REQUEST_MAX)
		fail(INVALID_CONFIG, "the network configuration is too large", "expected at most 256 KiB beside prevResult");
	*length = at;
	return body;
}

/* The call was carried out, or may go on without it. */
static _Noreturn void succeed(enum command command, struct span previous)
{
	if (command == ADD && previous.at)
		put_span(previous);
	else if (command == ADD)
		printf("{\"cniVersion\":\"%s\",\"interfaces\":[],\"ips\":[],\"routes\":[],\"dns\":{}}", versions[version]);
	finish(0);
}

/* Prints the agent's error; returns when the answer is none. */
static void pass_error_on(struct span answer)
{
	struct span message = json_member(answer, "msg"), details = json_member(answer, "details");
	long code;

	if (!json_number(json_member(answer, "code"), 9999, &code) || !code || !message.at || *message.at != '"')
		return;
	printf("{\"cniVersion\":\"%s\",\"code\":%ld,\"msg\":", versions[version], code);
	put_span(message);
	if (details.at && *details.at == '"') {
		printf(",\"details\":");
		put_span(details);
	}
	putchar('}');
	finish(1);
}

static bool goes_on_without_agent(enum command command, const struct settings *settings)
{
	switch (command) {
	case DEL:
		return true;
	case ADD:
		return settings->open || settings->always;
	case STATUS:
		return settings->open;
	case CHECK:
		return settings->always;
	case GC:
		return false;
	}
	return false;
}

static _Noreturn void go_without_agent(enum command command, const struct settings *settings, struct span previous,
				       const char *why)
{
	char details[WHY_MAX + 256];

	if (goes_on_without_agent(command, settings))
		succeed(command, previous);
	snprintf(details, sizeof(details),
		 "%s; see that the agent runs on this node and listens there. Containers start without it in the"
		 " namespaces of tidegate.always_start, and everywhere with tidegate.on_agent_absent \"open\", in the"
		 " network configuration", why);
	if (command == ADD)
		fail(TRY_AGAIN, "the tidegate agent does not answer, and without it this container would start outside the mesh",
		     details);
	fail(command == STATUS ? NOT_AVAILABLE : TRY_AGAIN, "the tidegate agent does not answer", details);
}

int main(void)
{
	struct span text, config, previous, answer;
	char why[WHY_MAX] = "its answer is not understood";
	struct settings settings;
	struct patience patience;
	enum command command;
	size_t length;
	char *body;

	signal(SIGPIPE, SIG_IGN);
	if (!strcmp(environment("CNI_COMMAND"), "VERSION")) {
		print_versions();
		finish(0);
	}
	command = command_named(environment("CNI_COMMAND"));
	text = read_input();
	config = json_whole(text.at, text.length);
	if (!json_is_object(config))
		fail(DECODING, "the network configuration on standard input is not a JSON object", NULL);
	version = version_of(config);
	if (version < commands[command].since)
		fail(INCOMPATIBLE_VERSION, "the version of the network configuration does not have this command",
		     commands[command].name);
	settings = read_settings(config);
	previous = previous_result(config);
	body = request(config, previous, &length);
	patience = (struct patience){ settings.wait_s * 1000, settings.timeout_s * 1000 };
	if (settings.always || command == DEL)
		patience.wait_ms = 0;
	if (settings.always && patience.timeout_ms > ALWAYS_TIMEOUT_MS)
		patience.timeout_ms = ALWAYS_TIMEOUT_MS;
	answer = agent_ask(settings.socket, body, length, patience, why);
	if (json_is_true(json_member(answer, "done")))
		succeed(command, previous);
	pass_error_on(answer);
	go_without_agent(command, &settings, previous, why);
}
