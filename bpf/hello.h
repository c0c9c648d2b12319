/* SPDX-License-Identifier: (BSD-2-Clause OR GPL-2.0) */
/*
 * Is this the beginning of a TLS ClientHello, and is it the mesh's?
 *
 * A walk over the known beginning of the client's stream. It is written as a machine that takes one field at a
 * time and keeps its place in memory, so that it makes no difference where a TCP segment or a TLS record ends.
 * Layer by layer: records (RFC 8446 5.1) carry a handshake message (4), which is a ClientHello (4.1.2) with
 * extensions; server_name (RFC 6066 3) and application_layer_protocol_negotiation (RFC 7301 3.1) are looked at.
 *
 * Until both headers were complete, a byte that contradicts TLS makes the stream plaintext. After that it is TLS,
 * however broken: what follows only decides between the mesh's and the application's own.
 */
#ifndef TIDEGATE_HELLO_H
#define TIDEGATE_HELLO_H

#include "maps.h"

enum tg_outcome {
	TG_MORE,		/* not decided, wants more bytes */
	TG_NOT_TLS,
	TG_OTHER_HELLO,
	TG_BROKEN_HELLO,	/* a hello, by its headers, with an inconsistent body */
	TG_MESH_HELLO,
};

enum tg_hello_flag {
	TG_HELLO_HEADERS = 1 << 0,
	TG_HELLO_SNI_DONE = 1 << 1,
	TG_HELLO_ALPN_DONE = 1 << 2,
};

/* The order of a ClientHello. Every field is a big-endian number, but for the two names. */
enum tg_field {
	FIELD_MESSAGE_TYPE,
	FIELD_MESSAGE_LENGTH,
	FIELD_VERSION,
	FIELD_SESSION_LENGTH,
	FIELD_CIPHERS_LENGTH,
	FIELD_COMPRESSION_LENGTH,
	FIELD_EXTENSIONS_LENGTH,
	FIELD_EXTENSION_TYPE,
	FIELD_EXTENSION_LENGTH,
	FIELD_SNI_LIST_LENGTH,
	FIELD_SNI_TYPE,
	FIELD_SNI_LENGTH,
	FIELD_SNI,
	FIELD_ALPN_LIST_LENGTH,
	FIELD_ALPN_LENGTH,
	FIELD_ALPN,
};

enum {
	RECORD_HANDSHAKE = 22,
	RECORD_MAJOR = 3,
	RECORD_MINOR_MAX = 4,
	RECORD_LENGTH_MAX = 1 << 14,
	MESSAGE_CLIENT_HELLO = 1,
	/* version, random, empty session id, one cipher suite, one compression method */
	HELLO_LENGTH_MIN = 2 + 32 + 1 + 2 + 2 + 1 + 1,
	HELLO_LENGTH_MAX = 1 << 17,
	RANDOM_LENGTH = 32,
	SESSION_LENGTH_MAX = 32,
	EXTENSION_SERVER_NAME = 0,
	EXTENSION_ALPN = 16,
	SNI_HOST_NAME = 0,
	/* Every turn of the walk takes at least one byte or ends it; one more to see the end. */
	WALK_TURNS = TG_PREFIX_BYTES + 1,
};

struct match {
	const struct tg_text *text;
	const struct tg_hello *hello;
	__u32 offset;		/* where in the name the text has to be */
	__u32 equal;
};

static long match_byte(__u32 index, struct match *match)
{
	__u8 wanted = match->text->bytes[index & (TG_TEXT_BYTES - 1)];
	__u8 found = match->hello->name[(match->offset + index) & (TG_NAME_BYTES - 1)];

	match->equal = wanted == found;
	return !match->equal;
}

static __always_inline int name_ends_with(const struct tg_hello *hello, const struct tg_text *text)
{
	struct match match = { .text = text, .hello = hello };

	if (!text->length || text->length > hello->name_length)
		return 0;
	match.offset = hello->name_length - text->length;
	if (bpf_loop(text->length, match_byte, &match, 0) < 0)
		return 0;
	return match.equal;
}

/* A suffix begins with a dot: there has to be a label in front of it. */
static __always_inline int is_mesh_sni(const struct tg_hello *hello, __u32 profile_id)
{
	struct tg_profile *profile = bpf_map_lookup_elem(&profiles, &profile_id);
	__u32 i;

	if (!profile)
		return 0;
	for (i = 0; i < TG_NAMES && i < profile->suffix_count; i++) {
		struct tg_text *suffix = &profile->suffixes[i];

		if (hello->name_length > suffix->length && name_ends_with(hello, suffix))
			return 1;
	}
	return 0;
}

static __always_inline int is_mesh_alpn(const struct tg_hello *hello, __u32 profile_id)
{
	struct tg_profile *profile = bpf_map_lookup_elem(&profiles, &profile_id);
	__u32 i;

	if (!profile)
		return 0;
	for (i = 0; i < TG_NAMES && i < profile->alpn_count; i++) {
		struct tg_text *alpn = &profile->alpns[i];

		if (hello->name_length == alpn->length && name_ends_with(hello, alpn))
			return 1;
	}
	return 0;
}

/* Ends the walk; its return value is that of the step. */
static __always_inline long decide(struct tg_hello *hello, enum tg_outcome outcome)
{
	hello->outcome = outcome;
	return 1;
}

static __always_inline long contradict(struct tg_hello *hello)
{
	return decide(hello, hello->flags & TG_HELLO_HEADERS ? TG_BROKEN_HELLO : TG_NOT_TLS);
}

/* Continues the walk with another field. */
static __always_inline long expect(struct tg_hello *hello, enum tg_field field, __u16 bytes)
{
	hello->field = field;
	hello->wanted = bytes;
	hello->number = 0;
	return 0;
}

static __always_inline long expect_name(struct tg_hello *hello, enum tg_field field, __u16 bytes)
{
	hello->name_length = 0;
	return expect(hello, field, bytes);
}

static __always_inline long leave_extension(struct tg_hello *hello)
{
	hello->skip = hello->extension_left;
	return expect(hello, FIELD_EXTENSION_TYPE, 2);
}

static __always_inline long leave_looked_at(struct tg_hello *hello, enum tg_hello_flag done)
{
	hello->flags |= done;
	if ((hello->flags & TG_HELLO_SNI_DONE) && (hello->flags & TG_HELLO_ALPN_DONE))
		return decide(hello, TG_OTHER_HELLO);
	return leave_extension(hello);
}

static __always_inline void consume(struct tg_hello *hello, __u32 bytes)
{
	hello->position += bytes;
	hello->record_left -= bytes;
	if (hello->flags & TG_HELLO_HEADERS)
		hello->hello_left -= bytes;
	hello->extension_left -= bytes < hello->extension_left ? bytes : hello->extension_left;
}

static __always_inline long record_header_byte(struct tg_hello *hello, __u8 byte)
{
	hello->position++;
	switch (hello->record_at++) {
	case 0:
		return byte == RECORD_HANDSHAKE ? 0 : contradict(hello);
	case 1:
		return byte == RECORD_MAJOR ? 0 : contradict(hello);
	case 2:
		return byte <= RECORD_MINOR_MAX ? 0 : contradict(hello);
	case 3:
		hello->record_length = byte << 8;
		return byte <= RECORD_LENGTH_MAX >> 8 ? 0 : contradict(hello);
	}
	hello->record_length |= byte;
	hello->record_at = 0;
	hello->record_left = hello->record_length;
	if (!hello->record_length || hello->record_length > RECORD_LENGTH_MAX)
		return contradict(hello);
	/* A ClientHello is alone in its last record: RFC 8446 5.1, no message may follow it before the reply. */
	if ((hello->flags & TG_HELLO_HEADERS) && hello->record_length > hello->hello_left)
		return contradict(hello);
	return 0;
}

/* A field is complete: what it means, and what comes next. */
static __always_inline long read_field(struct tg_hello *hello, __u32 profile)
{
	__u32 number = hello->number;

	switch (hello->field) {
	case FIELD_MESSAGE_TYPE:
		if (number != MESSAGE_CLIENT_HELLO)
			return contradict(hello);
		return expect(hello, FIELD_MESSAGE_LENGTH, 3);
	case FIELD_MESSAGE_LENGTH:
		if (number < HELLO_LENGTH_MIN || number > HELLO_LENGTH_MAX || hello->record_left > number)
			return contradict(hello);
		hello->hello_left = number;
		hello->flags |= TG_HELLO_HEADERS;
		return expect(hello, FIELD_VERSION, 2);
	case FIELD_VERSION:
		if (number >> 8 != RECORD_MAJOR)
			return contradict(hello);
		hello->skip = RANDOM_LENGTH;
		return expect(hello, FIELD_SESSION_LENGTH, 1);
	case FIELD_SESSION_LENGTH:
		if (number > SESSION_LENGTH_MAX)
			return contradict(hello);
		hello->skip = number;
		return expect(hello, FIELD_CIPHERS_LENGTH, 2);
	case FIELD_CIPHERS_LENGTH:
		if (!number || number % 2)
			return contradict(hello);
		hello->skip = number;
		return expect(hello, FIELD_COMPRESSION_LENGTH, 1);
	case FIELD_COMPRESSION_LENGTH:
		if (!number)
			return contradict(hello);
		hello->skip = number;
		return expect(hello, FIELD_EXTENSIONS_LENGTH, 2);
	case FIELD_EXTENSIONS_LENGTH:
		if (number != hello->hello_left)
			return contradict(hello);
		return expect(hello, FIELD_EXTENSION_TYPE, 2);
	case FIELD_EXTENSION_TYPE:
		hello->extension = number;
		return expect(hello, FIELD_EXTENSION_LENGTH, 2);
	case FIELD_EXTENSION_LENGTH:
		if (number > hello->hello_left)
			return contradict(hello);
		hello->extension_left = number;
		if (hello->extension == EXTENSION_SERVER_NAME && number)
			return expect(hello, FIELD_SNI_LIST_LENGTH, 2);
		if (hello->extension == EXTENSION_ALPN && number)
			return expect(hello, FIELD_ALPN_LIST_LENGTH, 2);
		return leave_extension(hello);
	case FIELD_SNI_LIST_LENGTH:
		if (number != hello->extension_left)
			return contradict(hello);
		return expect(hello, FIELD_SNI_TYPE, 1);
	case FIELD_SNI_TYPE:
		if (number != SNI_HOST_NAME)
			return leave_looked_at(hello, TG_HELLO_SNI_DONE);
		return expect(hello, FIELD_SNI_LENGTH, 2);
	case FIELD_SNI_LENGTH:
		if (!number || number > hello->extension_left)
			return contradict(hello);
		if (number >= TG_NAME_BYTES)
			return leave_looked_at(hello, TG_HELLO_SNI_DONE);
		return expect_name(hello, FIELD_SNI, number);
	case FIELD_SNI:
		if (is_mesh_sni(hello, profile))
			return decide(hello, TG_MESH_HELLO);
		return leave_looked_at(hello, TG_HELLO_SNI_DONE);
	case FIELD_ALPN_LIST_LENGTH:
		if (number != hello->extension_left)
			return contradict(hello);
		return expect(hello, FIELD_ALPN_LENGTH, 1);
	case FIELD_ALPN_LENGTH:
		if (!number || number > hello->extension_left)
			return contradict(hello);
		return expect_name(hello, FIELD_ALPN, number);
	case FIELD_ALPN:
		if (is_mesh_alpn(hello, profile))
			return decide(hello, TG_MESH_HELLO);
		if (hello->extension_left)
			return expect(hello, FIELD_ALPN_LENGTH, 1);
		return leave_looked_at(hello, TG_HELLO_ALPN_DONE);
	}
	return contradict(hello);
}

/* A hello may end before its extensions, or after any of them; anywhere else it is cut off. */
static __always_inline enum tg_outcome end_of_hello(const struct tg_hello *hello)
{
	if (hello->skip || hello->extension_left)
		return TG_BROKEN_HELLO;
	if (hello->field == FIELD_EXTENSIONS_LENGTH && hello->wanted == 2)
		return TG_OTHER_HELLO;
	if (hello->field == FIELD_EXTENSION_TYPE && hello->wanted == 2)
		return TG_OTHER_HELLO;
	return TG_BROKEN_HELLO;
}

static __always_inline __u32 least(__u32 a, __u32 b)
{
	return a < b ? a : b;
}

static __always_inline __u8 lower(__u8 byte)
{
	return byte >= 'A' && byte <= 'Z' ? byte + 'a' - 'A' : byte;
}

static long walk_step(__u32 turn, struct tg_prefix **context)
{
	struct tg_prefix *prefix = *context;
	struct tg_hello *hello = &prefix->hello;
	__u32 available = prefix->have - hello->position;
	__u32 bytes;
	__u8 byte;

	if ((hello->flags & TG_HELLO_HEADERS) && !hello->hello_left)
		return decide(hello, end_of_hello(hello));
	if (!available)
		return 1;
	byte = prefix->bytes[hello->position & (TG_PREFIX_BYTES - 1)];
	if (!hello->record_left)
		return record_header_byte(hello, byte);
	if (hello->skip) {
		bytes = least(least(hello->skip, available),
			      least(hello->record_left, hello->hello_left));
		hello->skip -= bytes;
		consume(hello, bytes);
		return 0;
	}
	if (hello->field > FIELD_EXTENSION_LENGTH && !hello->extension_left)
		return contradict(hello);
	consume(hello, 1);
	if (hello->field == FIELD_SNI || hello->field == FIELD_ALPN)
		hello->name[hello->name_length++ & (TG_NAME_BYTES - 1)] =
			hello->field == FIELD_SNI ? lower(byte) : byte;
	else
		hello->number = hello->number << 8 | byte;
	if (--hello->wanted)
		return 0;
	return read_field(hello, prefix->profile);
}

static __always_inline void begin_hello(struct tg_hello *hello)
{
	__builtin_memset(hello, 0, offsetof(struct tg_hello, name));
	expect(hello, FIELD_MESSAGE_TYPE, 1);
}

/* Walks on through prefix->bytes as far as they are known; the result also stays in prefix->hello. */
static __always_inline enum tg_outcome walk_hello(struct tg_prefix *prefix)
{
	if (prefix->hello.outcome == TG_MORE)
		bpf_loop(WALK_TURNS, walk_step, &prefix, 0);
	return prefix->hello.outcome;
}

#endif
