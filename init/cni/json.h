/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Reads JSON (RFC 8259) where it lies: values are spans of the text, so that they can be passed on byte for byte.
 * Uses neither recursion nor memory of its own, and is bounded by the text.
 */
#ifndef TIDEGATE_JSON_H
#define TIDEGATE_JSON_H

#include <stdbool.h>
#include <stddef.h>

enum {
	JSON_DEPTH = 512,	/* levels of nesting that are read */
};

/* A part of a text; at is NULL where there is none. */
struct span {
	const char *at;
	size_t length;
};

/* The one value that the text consists of, without the blanks around it; none where it is no JSON, or no UTF-8. */
struct span json_whole(const char *text, size_t length);

/* The functions below take what json_whole has found, or parts of it. */

bool json_is_object(struct span value);
bool json_is_null(struct span value);
bool json_is_true(struct span value);

/* The value of a member, the last of that name, as most readers have it; none for what has no such member. */
struct span json_member(struct span object, const char *name);

/* The first item of an array, and the one after `item`; none after the last, and for what is no array. */
struct span json_first(struct span array);
struct span json_next(struct span array, struct span item);

/* Whether the value is a string of this text. */
bool json_equals(struct span value, const char *text, size_t length);

/* Copies a string, ended by a zero. False for what is no string, has a zero in it, or is too long. */
bool json_copy(struct span value, char *out, size_t size);

/* A whole number from 0 to most. False for everything else. */
bool json_number(struct span value, long most, long *out);

#endif
