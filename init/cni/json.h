/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Reads JSON (RFC 8259) where it lies: values are spans of the text, so that they can be passed on byte for byte.
 * json_whole says whether a text is JSON; the other functions take what it has found, or parts of that. Whether what
 * is in strings is UTF-8 is left to those who read them.
 */
#ifndef TIDEGATE_JSON_H
#define TIDEGATE_JSON_H

#include <stdbool.h>
#include <stddef.h>

enum {
	JSON_DEPTH = 512,	/* levels of nesting that are read */
	JSON_TEXT = 256,	/* bytes of what a string can be compared with, and of its zero */
};

/* A part of a text; at is NULL where there is none. */
struct span {
	const char *at;
	size_t length;
};

/* The one value that a text consists of, whose last byte a zero follows; none where it is no JSON. */
struct span json_whole(const char *text, size_t length);

/* Whether there is a value that begins so: { is an object, [ an array, " a string, n null, t true. */
bool json_is(struct span value, char first);

/* The value of a member, the last of that name, as most readers have it; none for what has no such member. */
struct span json_member(struct span object, const char *name);

/* Whether it is this string; whether it is an array that has it. */
bool json_equals(struct span value, const char *text);
bool json_has(struct span array, const char *text);

/* Copies a string, ended by a zero. False for what is no string, does not fit, or has a zero or a \u beyond ASCII. */
bool json_copy(struct span value, char *out, size_t size);

/* A whole number from 0 to most. False for everything else. */
bool json_number(struct span value, long most, long *out);

#endif
