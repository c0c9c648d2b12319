// SPDX-License-Identifier: Apache-2.0
/*
 * The CNI plugin: hands a call to the node's agent, and prints one JSON object or nothing, whatever happens. It knows
 * nothing of redirection and needs nothing of the host but the agent's socket. The agent's error, and the result of the
 * plugins before it, it passes on byte for byte.
 *
 * Without an agent: what is taken away (DEL) is gone with its namespace; what starts (ADD) fails, unless the network
 * configuration says otherwise, or the pod's namespace is one that always starts.
 */
#include <arpa/inet.h>
#include <poll.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "agent.h"

#define COUNT(array) (sizeof(array) / sizeof(*(array)))

enum {
	INPUT_MAX = 16 << 20,
	INPUT_MS = 10 * 1000,
	REQUEST_MAX = 256 << 10,	/* MAX_REQUEST_BYTES in agent/tidegate/workloads/cni.py */
	HEADER = 8,			/* the magic number, and the length of what follows */
	DETAILS_MAX = 1024,
	SECONDS_MAX = 600,
	ALWAYS_TIMEOUT_MS = 2 * 1000,	/* for an agent that does not answer, where it need not */
};

/* SPEC.md of CNI, "Error" */
enum {
	INCOMPATIBLE_VERSION = 1,
	INVALID_ENVIRONMENT = 4,
	IO_FAILURE = 5,
	DECODING = 6,
	INVALID_CONFIG = 7,
	TRY_AGAIN = 11,
	NOT_AVAILABLE = 50,
	CODE_MAX = 9999,
};

/* Where a call goes on without an agent. */
enum {
	ANYWHERE = 1,
	WHERE_OPEN = 2,			/* by on_agent_absent */
	WHERE_ALWAYS = 4,		/* in the namespaces of always_start */
};

static const struct command {
	const char *name;
	const char *since;		/* version of the specification */
	int goes_on;
	int otherwise;			/* the error, where it does not go on */
	bool has_result;
} commands[] = {
	{ "ADD", "0.3.0", WHERE_OPEN | WHERE_ALWAYS, TRY_AGAIN, true },
	{ "DEL", "0.3.0", ANYWHERE, TRY_AGAIN, false },
	{ "CHECK", "0.4.0", WHERE_ALWAYS, TRY_AGAIN, false },
	{ "STATUS", "1.1.0", WHERE_OPEN, NOT_AVAILABLE, false },
	{ "GC", "1.1.0", 0, TRY_AGAIN, false },
};

/* The versions that are spoken, in their order, which is that of texts too; and the network configuration's. */
static const char *const versions[] = { "0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0" };
static const char *version = "1.1.0";

struct settings {
	struct sockaddr_un socket;
	struct patience patience;
	int here;			/* ANYWHERE, and what else is so of the container */
};

/* Ends the program; with an error if not all of the output was taken. */
static _Noreturn void finish(int status)
{
	_exit(fflush(stdout) ? 1 : status);
}

__attribute__((format(printf, 3, 4)))
static _Noreturn void fail(int code, const char *message, const char *format, ...)
{
	char details[DETAILS_MAX];
	va_list arguments;

	va_start(arguments, format);
	vsnprintf(details, sizeof(details), format, arguments);
	va_end(arguments);
	for (char *c = details; *c; c++)
		if (*c < ' ' || *c > '~' || *c == '"' || *c == '\\')
			*c = '?';
	printf("{\"cniVersion\":\"%s\",\"code\":%d,\"msg\":\"%s\",\"details\":\"%s\"}", version, code, message, details);
	finish(1);
}

static const char *environment(const char *name)
{
	const char *value = getenv(name);

	return value ? value : "";
}

static const struct command *read_command(void)
{
	const char *name = environment("CNI_COMMAND");

	for (size_t i = 0; i < COUNT(commands); i++)
		if (!strcmp(name, commands[i].name))
			return &commands[i];
	if (strcmp(name, "VERSION"))
		fail(INVALID_ENVIRONMENT, "CNI_COMMAND is missing or wrong", "expected ADD, DEL, CHECK, STATUS, GC or VERSION");
	printf("{\"cniVersion\":\"%s\",\"supportedVersions\":[", version);
	for (size_t i = 0; i < COUNT(versions); i++)
		printf("%s\"%s\"", i ? "," : "", versions[i]);
	printf("]}");
	finish(0);
}

/* The network configuration, in a version that has the command. */
static struct span read_configuration(const struct command *command)
{
	static char text[INPUT_MAX + 1];
	long long until = now_ms() + INPUT_MS;
	struct span config, said;
	size_t length = 0;
	ssize_t got;

	do {
		got = wait_for(STDIN_FILENO, POLLIN, until) ? read(STDIN_FILENO, text + length, INPUT_MAX - length) : -1;
		if (got < 0)
			fail(IO_FAILURE, "standard input cannot be read", "expected a network configuration that ends within 10 s");
		length += got;
	} while (got);
	config = json_whole(text, length);
	if (!json_is(config, '{'))
		fail(DECODING, "the network configuration on standard input is wrong", "expected a JSON object below 16 MiB");
	said = json_member(config, "cniVersion");
	for (size_t i = 0; i < COUNT(versions); i++)
		if (json_equals(said, versions[i]) && strcmp(versions[i], command->since) >= 0) {
			version = versions[i];
			return config;
		}
	fail(INCOMPATIBLE_VERSION, "the version of the network configuration is not spoken, or does not have the command",
	     "cniVersion: expected 0.3.0, 0.3.1, 0.4.0, 1.0.0 or 1.1.0, of which %s has %s and later", command->name,
	     command->since);
}

/* Whether the pod's namespace, as CNI_ARGS says it, is one of these, or of those that always start by default. */
static bool always_starts(struct span namespaces)
{
	static const char by_default[] = "[\"kube-system\",\"tidegate-system\"]", name[] = "K8S_POD_NAMESPACE=";
	char namespace[JSON_TEXT] = "";

	for (const char *pair = environment("CNI_ARGS"); *pair; pair += strcspn(pair, ";"), pair += *pair == ';')
		if (!strncmp(pair, name, strlen(name)))
			snprintf(namespace, sizeof(namespace), "%s", pair + strlen(name));
	namespace[strcspn(namespace, ";")] = '\0';
	if (!json_is(namespaces, '['))
		namespaces = json_whole(by_default, strlen(by_default));
	return *namespace && json_has(namespaces, namespace);
}

/* What is said below "tidegate". A setting that is wrong counts as its default; that it is wrong tells the agent. */
static struct settings read_settings(struct span config)
{
	static const struct sockaddr_un by_default = { .sun_family = AF_UNIX, .sun_path = "/run/tidegate/cni.sock" };
	struct span section = json_member(config, "tidegate");
	struct settings settings = { .socket = by_default, .here = ANYWHERE };
	long wait_s = 3, timeout_s = 30;

	if (!json_copy(json_member(section, "socket"), settings.socket.sun_path, sizeof(settings.socket.sun_path)))
		settings.socket = by_default;
	if (json_equals(json_member(section, "on_agent_absent"), "open"))
		settings.here |= WHERE_OPEN;
	if (always_starts(json_member(section, "always_start")))
		settings.here |= WHERE_ALWAYS;
	json_number(json_member(section, "wait_s"), SECONDS_MAX, &wait_s);
	json_number(json_member(section, "timeout_s"), SECONDS_MAX, &timeout_s);
	settings.patience = (struct patience){ wait_s * 1000, timeout_s * 1000 };
	return settings;
}

static void append(char *request, size_t *length, const char *bytes, size_t more)
{
	if (more > HEADER + REQUEST_MAX - *length)
		fail(INVALID_CONFIG, "the network configuration is too large", "expected at most 256 KiB beside prevResult");
	memcpy(request + *length, bytes, more);
	*length += more;
}

/* What is sent to the agent: the environment, each variable with its zero, and the configuration without prevResult. */
static struct span make_request(struct span config, struct span previous)
{
	static const char *const names[] = { "CNI_COMMAND", "CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME", "CNI_ARGS" };
	static char request[HEADER + REQUEST_MAX];
	const char *end = config.at + config.length;
	size_t length = HEADER;
	unsigned int follows;

	for (size_t i = 0; i < COUNT(names); i++)
		append(request, &length, environment(names[i]), strlen(environment(names[i])) + 1);
	if (previous.at) {
		append(request, &length, config.at, previous.at - config.at);
		append(request, &length, "null", 4);
		config.at = previous.at + previous.length;
	}
	append(request, &length, config.at, end - config.at);
	follows = htonl(length - HEADER);
	memcpy(request, "TGC1", 4);
	memcpy(request + 4, &follows, 4);
	return (struct span){ request, length };
}

/* The call was carried out, or may go on without it. */
static _Noreturn void succeed(const struct command *command, struct span previous)
{
	if (command->has_result && json_is(previous, '{'))
		fwrite(previous.at, 1, previous.length, stdout);
	else if (command->has_result)
		printf("{\"cniVersion\":\"%s\",\"interfaces\":[],\"ips\":[],\"routes\":[],\"dns\":{}}", version);
	finish(0);
}

/* Prints the agent's error, behind the version that it is to name; returns when the answer is none. */
static void pass_error_on(struct span answer)
{
	long code;

	if (!json_number(json_member(answer, "code"), CODE_MAX, &code) || !code || !json_is(json_member(answer, "msg"), '"'))
		return;
	printf("{\"cniVersion\":\"%s\",", version);
	fwrite(answer.at + 1, 1, answer.length - 1, stdout);
	finish(1);
}

int main(void)
{
	const struct command *command = read_command();
	struct span config = read_configuration(command);
	struct span previous = json_member(config, "prevResult"), answer;
	struct settings settings = read_settings(config);
	const char *why = "its answer is not understood";

	if (previous.at && !json_is(previous, '{') && !json_is(previous, 'n'))
		fail(INVALID_CONFIG, "the network configuration is wrong", "prevResult: expected an object");
	if (command->goes_on & settings.here & ~WHERE_OPEN)
		settings.patience.wait_ms = 0;
	if (settings.here & WHERE_ALWAYS && settings.patience.timeout_ms > ALWAYS_TIMEOUT_MS)
		settings.patience.timeout_ms = ALWAYS_TIMEOUT_MS;
	answer = agent_ask(&settings.socket, make_request(config, previous), settings.patience, &why);
	if (json_is(json_member(answer, "done"), 't'))
		succeed(command, previous);
	pass_error_on(answer);
	if (command->goes_on & settings.here)
		succeed(command, previous);
	fail(command->otherwise,
	     command->has_result ? "the tidegate agent does not answer, and without it this container would start outside the mesh"
				 : "the tidegate agent does not answer",
	     "%s: %s; see that the agent runs on this node and listens there. Containers start without it in the namespaces"
	     " of tidegate.always_start, and everywhere with tidegate.on_agent_absent 'open', in the network configuration",
	     settings.socket.sun_path, why);
}
