// SPDX-License-Identifier: Apache-2.0
#include "json.h"

#include <string.h>

/* Functions called *_end take a position where something begins and give the one behind it, NULL where it is wrong. */

static const char *blanks_end(const char *at, const char *end)
{
	while (at < end && (*at == ' ' || *at == '\t' || *at == '\n' || *at == '\r'))
		at++;
	return at;
}

static int hex_digit(char c)
{
	if (c >= '0' && c <= '9')
		return c - '0';
	if (c >= 'a' && c <= 'f')
		return c - 'a' + 10;
	if (c >= 'A' && c <= 'F')
		return c - 'A' + 10;
	return -1;
}

/* One character of UTF-8 beyond ASCII (RFC 3629): none longer than needed, no surrogates, none above U+10FFFF. */
static const char *character_end(const char *at, const char *end)
{
	unsigned char first = *at;
	unsigned char least = 0x80, most = 0xbf;
	int more;

	if (first >= 0xc2 && first <= 0xdf)
		more = 1;
	else if (first >= 0xe0 && first <= 0xef)
		more = 2;
	else if (first >= 0xf0 && first <= 0xf4)
		more = 3;
	else
		return NULL;
	if (first == 0xe0)
		least = 0xa0;
	else if (first == 0xed)
		most = 0x9f;
	else if (first == 0xf0)
		least = 0x90;
	else if (first == 0xf4)
		most = 0x8f;
	if (end - at <= more)
		return NULL;
	for (at++; more; more--, at++) {
		unsigned char byte = *at;

		if (byte < least || byte > most)
			return NULL;
		least = 0x80;
		most = 0xbf;
	}
	return at;
}

static const char *escape_end(const char *at, const char *end)
{
	if (end - at < 2)
		return NULL;
	if (at[1] != 'u')
		return strchr("\"\\/bfnrt", at[1]) && at[1] ? at + 2 : NULL;
	if (end - at < 6)
		return NULL;
	for (int i = 2; i < 6; i++)
		if (hex_digit(at[i]) < 0)
			return NULL;
	return at + 6;
}

static const char *string_end(const char *at, const char *end)
{
	if (at == end || *at != '"')
		return NULL;
	at++;
	while (at && at < end) {
		unsigned char c = *at;

		if (c == '"')
			return at + 1;
		if (c < ' ')
			return NULL;
		if (c == '\\')
			at = escape_end(at, end);
		else
			at = c < 0x80 ? at + 1 : character_end(at, end);
	}
	return NULL;
}

static const char *digits_end(const char *at, const char *end)
{
	const char *first = at;

	while (at < end && *at >= '0' && *at <= '9')
		at++;
	return at > first ? at : NULL;
}

static const char *number_end(const char *at, const char *end)
{
	if (at < end && *at == '-')
		at++;
	if (at < end && *at == '0')
		at++;
	else if (!(at = digits_end(at, end)))
		return NULL;
	if (at < end && *at == '.' && !(at = digits_end(at + 1, end)))
		return NULL;
	if (at < end && (*at == 'e' || *at == 'E')) {
		at++;
		if (at < end && (*at == '+' || *at == '-'))
			at++;
		at = digits_end(at, end);
	}
	return at;
}

static const char *word_end(const char *at, const char *end, const char *word)
{
	size_t length = strlen(word);

	return (size_t)(end - at) >= length && !memcmp(at, word, length) ? at + length : NULL;
}

static const char *scalar_end(const char *at, const char *end)
{
	if (at == end)
		return NULL;
	switch (*at) {
	case '"':
		return string_end(at, end);
	case 't':
		return word_end(at, end, "true");
	case 'f':
		return word_end(at, end, "false");
	case 'n':
		return word_end(at, end, "null");
	default:
		return number_end(at, end);
	}
}

/* A member's name with its colon. */
static const char *name_end(const char *at, const char *end)
{
	at = string_end(blanks_end(at, end), end);
	if (!at)
		return NULL;
	at = blanks_end(at, end);
	return at < end && *at == ':' ? at + 1 : NULL;
}

static const char *value_end(const char *at, const char *end)
{
	bool is_object[JSON_DEPTH];
	int depth = 0;

	for (;;) {
		at = blanks_end(at, end);
		if (at < end && (*at == '{' || *at == '[')) {
			if (depth == JSON_DEPTH)
				return NULL;
			is_object[depth++] = *at == '{';
			at = blanks_end(at + 1, end);
			if (at == end)
				return NULL;
			if (*at != '}' && *at != ']') {
				if (is_object[depth - 1] && !(at = name_end(at, end)))
					return NULL;
				continue;
			}
		} else {
			at = scalar_end(at, end);
			if (!at)
				return NULL;
		}
		/* Behind a value, or in front of the end of an empty one: what ends here. */
		while (depth) {
			at = blanks_end(at, end);
			if (at == end)
				return NULL;
			if (*at == ',')
				break;
			if (*at != (is_object[depth - 1] ? '}' : ']'))
				return NULL;
			depth--;
			at++;
		}
		if (!depth)
			return at;
		at++;
		if (is_object[depth - 1] && !(at = name_end(at, end)))
			return NULL;
	}
}

static struct span between(const char *at, const char *end)
{
	return at && end ? (struct span){ at, end - at } : (struct span){ NULL, 0 };
}

struct span json_whole(const char *text, size_t length)
{
	const char *end = text + length;
	const char *first = blanks_end(text, end);
	const char *behind = value_end(first, end);

	if (!behind || blanks_end(behind, end) != end)
		return between(NULL, NULL);
	return between(first, behind);
}

bool json_is_object(struct span value)
{
	return value.at && *value.at == '{';
}

bool json_is_null(struct span value)
{
	return value.at && *value.at == 'n';
}

bool json_is_true(struct span value)
{
	return value.at && *value.at == 't';
}

struct span json_member(struct span object, const char *name)
{
	struct span found = { NULL, 0 };
	const char *at, *end;

	if (!json_is_object(object))
		return found;
	end = object.at + object.length;
	at = blanks_end(object.at + 1, end);
	while (*at == '"') {
		const char *behind = string_end(at, end);
		struct span key = between(at, behind);
		const char *value = blanks_end(name_end(at, end), end);

		at = value_end(value, end);
		if (json_equals(key, name, strlen(name)))
			found = between(value, at);
		at = blanks_end(at, end);
		if (*at == ',')
			at = blanks_end(at + 1, end);
	}
	return found;
}

static struct span item_at(struct span array, const char *at)
{
	const char *end = array.at + array.length;

	at = blanks_end(at, end);
	return *at == ']' ? between(NULL, NULL) : between(at, value_end(at, end));
}

struct span json_first(struct span array)
{
	if (!array.at || *array.at != '[')
		return between(NULL, NULL);
	return item_at(array, array.at + 1);
}

struct span json_next(struct span array, struct span item)
{
	const char *at = blanks_end(item.at + item.length, array.at + array.length);

	return *at == ',' ? item_at(array, at + 1) : between(NULL, NULL);
}

/* The number of four hexadecimal digits. */
static unsigned int unit(const char *at)
{
	unsigned int number = 0;

	for (int i = 0; i < 4; i++)
		number = number << 4 | (unsigned int)hex_digit(at[i]);
	return number;
}

/* Writes what an escape stands for, in UTF-8, and moves behind it; how many bytes that are. */
static int unescape(const char **at, const char *end, char out[4])
{
	static const char from[] = "\"\\/bfnrt", to[] = "\"\\/\b\f\n\r\t";
	unsigned int code;

	if ((*at)[1] != 'u') {
		out[0] = to[strchr(from, (*at)[1]) - from];
		*at += 2;
		return 1;
	}
	code = unit(*at + 2);
	*at += 6;
	if (code >> 10 == 0x36 && end - *at > 6 && (*at)[0] == '\\' && (*at)[1] == 'u' &&
	    unit(*at + 2) >> 10 == 0x37) {
		code = 0x10000 + ((code & 0x3ff) << 10 | (unit(*at + 2) & 0x3ff));
		*at += 6;
	}
	if (code < 0x80) {
		out[0] = code;
		return 1;
	}
	if (code < 0x800) {
		out[0] = 0xc0 | code >> 6;
		out[1] = 0x80 | (code & 0x3f);
		return 2;
	}
	if (code < 0x10000) {
		out[0] = 0xe0 | code >> 12;
		out[1] = 0x80 | (code >> 6 & 0x3f);
		out[2] = 0x80 | (code & 0x3f);
		return 3;
	}
	out[0] = 0xf0 | code >> 18;
	out[1] = 0x80 | (code >> 12 & 0x3f);
	out[2] = 0x80 | (code >> 6 & 0x3f);
	out[3] = 0x80 | (code & 0x3f);
	return 4;
}

/* The bytes of the next character of a string, or some of them; how many. */
static int next_bytes(const char **at, const char *end, char out[4])
{
	if (**at == '\\')
		return unescape(at, end, out);
	out[0] = *(*at)++;
	return 1;
}

bool json_equals(struct span value, const char *text, size_t length)
{
	const char *at, *end;
	char bytes[4];

	if (!value.at || *value.at != '"')
		return false;
	end = value.at + value.length - 1;
	for (at = value.at + 1; at < end;) {
		size_t count = next_bytes(&at, end, bytes);

		if (length < count || memcmp(text, bytes, count))
			return false;
		text += count;
		length -= count;
	}
	return !length;
}

bool json_copy(struct span value, char *out, size_t size)
{
	const char *at, *end;
	char bytes[4];

	if (!value.at || *value.at != '"')
		return false;
	end = value.at + value.length - 1;
	for (at = value.at + 1; at < end;) {
		size_t count = next_bytes(&at, end, bytes);

		if (!bytes[0] || size <= count)
			return false;
		memcpy(out, bytes, count);
		out += count;
		size -= count;
	}
	*out = '\0';
	return true;
}

bool json_number(struct span value, long most, long *out)
{
	long number = 0;

	if (!value.at)
		return false;
	for (size_t i = 0; i < value.length; i++) {
		if (value.at[i] < '0' || value.at[i] > '9')
			return false;
		number = number * 10 + value.at[i] - '0';
		if (number > most)
			return false;
	}
	*out = number;
	return true;
}
