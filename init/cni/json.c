// SPDX-License-Identifier: Apache-2.0
#include "json.h"

#include <stdlib.h>
#include <string.h>

static const struct span NONE;

/*
 * Functions called *_end take a position where something begins and give the one behind it; NULL where it is wrong.
 * None goes beyond the zero at the end of the text, which no JSON has anywhere.
 */

static const char *blanks_end(const char *at)
{
	return at + strspn(at, " \t\n\r");
}

/* What follows a backslash. */
static const char *escape_end(const char *at)
{
	if (*at == 'u')
		return strspn(at + 1, "0123456789abcdefABCDEF") >= 4 ? at + 5 : NULL;
	return *at && strchr("\"\\/bfnrt", *at) ? at + 1 : NULL;
}

static const char *string_end(const char *at)
{
	if (*at++ != '"')
		return NULL;
	while (at && (unsigned char)*at >= ' ' && *at != '"')
		at = *at == '\\' ? escape_end(at + 1) : at + 1;
	return at && *at == '"' ? at + 1 : NULL;
}

static const char *digits_end(const char *at)
{
	size_t digits = strspn(at, "0123456789");

	return digits ? at + digits : NULL;
}

static const char *number_end(const char *at)
{
	at += *at == '-';
	at = *at == '0' ? at + 1 : digits_end(at);
	if (at && *at == '.')
		at = digits_end(at + 1);
	if (at && (*at == 'e' || *at == 'E')) {
		at++;
		at = digits_end(at + (*at == '+' || *at == '-'));
	}
	return at;
}

static const char *scalar_end(const char *at)
{
	if (*at == '"')
		return string_end(at);
	if (!strncmp(at, "true", 4) || !strncmp(at, "null", 4))
		return at + 4;
	return strncmp(at, "false", 5) ? number_end(at) : at + 5;
}

/* A member's name with its colon. */
static const char *name_end(const char *at)
{
	at = string_end(blanks_end(at));
	if (at)
		at = blanks_end(at);
	return at && *at == ':' ? at + 1 : NULL;
}

static const char *value_end(const char *at, int depth)
{
	char closing;

	at = blanks_end(at);
	if (*at != '{' && *at != '[')
		return scalar_end(at);
	if (!depth)
		return NULL;
	closing = *at == '{' ? '}' : ']';
	at = blanks_end(at + 1);
	if (*at == closing)
		return at + 1;
	do {
		at = closing == '}' ? name_end(at) : at;
		at = at ? value_end(at, depth - 1) : NULL;
		if (!at)
			return NULL;
		at = blanks_end(at);
	} while (*at++ == ',');
	return at[-1] == closing ? at : NULL;
}

struct span json_whole(const char *text, size_t length)
{
	const char *first = blanks_end(text);
	const char *behind = value_end(first, JSON_DEPTH);

	return behind && blanks_end(behind) == text + length ? (struct span){ first, behind - first } : NONE;
}

bool json_is(struct span value, char first)
{
	return value.at && *value.at == first;
}

/* The value at a position in an object or array, or behind a comma there; its name, in objects. None at the end. */
static struct span next_value(const char *at, struct span *name)
{
	at = blanks_end(at);
	if (*at == ',')
		at = blanks_end(at + 1);
	if (*at == '}' || *at == ']')
		return NONE;
	if (name) {
		*name = (struct span){ at, string_end(at) - at };
		at = blanks_end(strchr(at + name->length, ':') + 1);
	}
	return (struct span){ at, value_end(at, JSON_DEPTH) - at };
}

struct span json_member(struct span object, const char *name)
{
	struct span found = NONE, key, value;

	if (!json_is(object, '{'))
		return NONE;
	for (const char *at = object.at + 1; (value = next_value(at, &key)).at; at = value.at + value.length)
		if (json_equals(key, name))
			found = value;
	return found;
}

bool json_has(struct span array, const char *text)
{
	struct span value;

	if (!json_is(array, '['))
		return false;
	for (const char *at = array.at + 1; (value = next_value(at, NULL)).at; at = value.at + value.length)
		if (json_equals(value, text))
			return true;
	return false;
}

bool json_equals(struct span value, const char *text)
{
	char copy[JSON_TEXT];

	return json_copy(value, copy, sizeof(copy)) && !strcmp(copy, text);
}

/* The byte that stands at a position of a string, and moves behind it; 0 for a \u beyond ASCII. */
static char next_byte(const char **at)
{
	static const char from[] = "\"\\/bfnrt", to[] = "\"\\/\b\f\n\r\t";
	char hex[5] = "";
	long code;

	if (**at != '\\')
		return *(*at)++;
	*at += 2;
	if ((*at)[-1] != 'u')
		return to[strchr(from, (*at)[-1]) - from];
	memcpy(hex, *at, 4);
	*at += 4;
	code = strtol(hex, NULL, 16);
	return code < 0x80 ? code : 0;
}

bool json_copy(struct span value, char *out, size_t size)
{
	if (!json_is(value, '"'))
		return false;
	for (const char *at = value.at + 1; *at != '"'; size--) {
		char byte = next_byte(&at);

		if (!byte || size == 1)
			return false;
		*out++ = byte;
	}
	*out = '\0';
	return true;
}

bool json_number(struct span value, long most, long *out)
{
	char *end;
	long number;

	if (!value.at || *value.at < '0' || *value.at > '9')
		return false;
	number = strtol(value.at, &end, 10);
	if (end != value.at + value.length || number > most)
		return false;
	*out = number;
	return true;
}
