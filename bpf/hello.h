/* SPDX-License-Identifier: (BSD-2-Clause OR GPL-2.0) */
/*
 * Is this the beginning of a TLS ClientHello, and is it the mesh's?
 *
 * A walk over the known bytes of the client's stream. It is written as a machine that takes one field at a
 * time and keeps its place in memory, so that it makes no difference where a TCP segment or a TLS record ends.
 * Layer by layer: records (RFC 8446 5.1) carry a handshake message (4), which is a ClientHello (4.1.2) with
 * extensions; server_name (RFC 6066 3) and application_layer_protocol_negotiation (RFC 7301 3.1) are looked at.
 *
 * Until both headers were complete, a byte that contradicts TLS makes the stream plaintext. After that it is TLS,
 * however broken: what follows only decides between the mesh's and the application's own.
 *
 * A hello of the SSLv2-compatible form (RFC 5246 E.2) has one header, and never is the mesh's.
 */
#ifndef TIDEGATE_HELLO_H
#define TIDEGATE_HELLO_H

#include "prefix.h"
#include "proxy.h"
#include "report.h"

enum tg_outcome {
	TG_MORE,		/* not decided, wants more bytes */
	TG_NOT_TLS,
	TG_OTHER_HELLO,
	TG_BROKEN_HELLO,	/* a hello, by its headers, with an inconsistent body */
	TG_MESH_HELLO,
};

enum tg_hello_flag {
	TG_HELLO_HEADERS = 1 << 0,
	TG_HELLO_SNI = 1 << 1,
	TG_HELLO_ALPN = 1 << 2,
	TG_HELLO_SSLV2 = 1 << 3,
	TG_HELLO_ENDED = 1 << 4,	/* no more of it is wanted */
};

/*
 * The order of a stream's beginning, of an SSLv2-compatible ClientHello, and of a ClientHello. Every field of a hello
 * is a big-endian number, but for the two names.
 */
enum tg_field {
	FIELD_START,
	FIELD_PROXY_TEXT,
	FIELD_PROXY_BINARY,
	FIELD_PROXY_BODY,
	FIELD_BASE,
	FIELD_SSLV2_LENGTH,
	FIELD_SSLV2_TYPE,
	FIELD_SSLV2_VERSION,
	FIELD_SSLV2_CIPHERS,
	FIELD_SSLV2_SESSION,
	FIELD_SSLV2_CHALLENGE,
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
	SSLV2_FIRST = 0x80,		/* the length's first bit: no padding */
	SSLV2_HEADER_LENGTH = 2 + 1 + 2 + 2 + 2 + 2,
	SSLV2_VERSION = 2,
	SSLV2_SESSION_LENGTH = 16,
	SSLV2_CHALLENGE_MIN = 16,
	SSLV2_CHALLENGE_MAX = 32,
	SSLV2_CIPHER_LENGTH = 3,
	/* Every turn of the walk takes at least one byte, but for three at the start and one that sees the end. */
	WALK_TURNS = TG_PREFIX_BYTES + 4,
};

struct match {
	const struct tg_text *text;
	const struct tg_hello *hello;
	__u32 text_left;	/* both are compared from the end */
	__u32 name_left;
	/*
	 * Where in the name the label of the text's * ends, and not whether there was a byte for it: before 6.7 the
	 * verifier walks a callback once, and takes what is known on the stack then for what it always is.
	 */
	__u32 label_end;
};

/* Whether the text's last byte that is left is a label of its own. */
static __always_inline int is_any_label(const struct match *match)
{
	const __u8 *bytes = match->text->bytes;
	__u32 left = match->text_left;

	if (bytes[(left - 1) & (TG_TEXT_BYTES - 1)] != '*')
		return 0;
	return (left < 2 || bytes[(left - 2) & (TG_TEXT_BYTES - 1)] == '.') &&
	       (left == match->text->length || bytes[left & (TG_TEXT_BYTES - 1)] == '.');
}

static long match_byte(__u32 turn, struct match *match)
{
	__u8 wanted, found;

	if (!match->text_left || !match->name_left)
		return 1;
	wanted = match->text->bytes[(match->text_left - 1) & (TG_TEXT_BYTES - 1)];
	found = match->hello->name[(match->name_left - 1) & (TG_NAME_BYTES - 1)];
	if (match->hello->field == FIELD_SNI && is_any_label(match)) {
		if (found != '.')
			match->name_left--;
		else if (match->name_left == match->label_end)
			return 1;
		else
			match->text_left--;
		return 0;
	}
	if (wanted != found)
		return 1;
	match->text_left--;
	match->name_left--;
	match->label_end = match->name_left;
	return 0;
}

/* How many bytes the name has in front of the text that it ends with; -1 where it does not end with it. */
static __always_inline __s32 in_front_of(const struct tg_text *text, const struct tg_hello *hello)
{
	struct match match = {
		.text = text, .hello = hello, .text_left = text->length, .name_left = hello->name_length,
		.label_end = hello->name_length,
	};

	bpf_loop(TG_TEXT_BYTES + TG_NAME_BYTES, match_byte, &match, 0);
	return match.text_left ? -1 : (__s32)match.name_left;
}

/* A suffix begins with a dot: there has to be a label in front of it. A label * in it stands for any one label. */
static __always_inline int is_mesh_sni(const struct tg_hello *hello, __u32 profile_id)
{
	struct tg_profile *profile = bpf_map_lookup_elem(&profiles, &profile_id);
	__u32 i;

	if (!profile)
		return 0;
	for (i = 0; i < TG_NAMES && i < profile->suffix_count; i++)
		if (in_front_of(&profile->suffixes[i], hello) > 0)
			return 1;
	return 0;
}

static __always_inline int is_mesh_alpn(const struct tg_hello *hello, __u32 profile_id)
{
	struct tg_profile *profile = bpf_map_lookup_elem(&profiles, &profile_id);
	__u32 i;

	if (!profile)
		return 0;
	for (i = 0; i < TG_NAMES && i < profile->alpn_count; i++)
		/* The length first: a hello may have thirty thousand names, and they are compared in a loop. */
		if (profile->alpns[i].length == hello->name_length && in_front_of(&profile->alpns[i], hello) == 0)
			return 1;
	return 0;
}

static __always_inline int is_mesh_port(__u16 port, __u32 profile_id)
{
	struct tg_profile *profile = bpf_map_lookup_elem(&profiles, &profile_id);
	__u32 i;

	if (!profile)
		return 0;
	for (i = 0; i < TG_PROXY_PORTS && i < profile->port_count; i++)
		if (profile->ports[i] == port)
			return 1;
	return 0;
}

/* Ends the walk; its return value is that of the step. */
static __always_inline long decide(struct tg_hello *hello, enum tg_outcome outcome)
{
	hello->outcome = outcome;
	hello->flags |= TG_HELLO_ENDED;
	return 1;
}

static __always_inline long contradict(struct tg_hello *hello)
{
	if (hello->outcome != TG_MORE)
		return decide(hello, hello->outcome);
	return decide(hello, hello->flags & TG_HELLO_HEADERS ? TG_BROKEN_HELLO : TG_NOT_TLS);
}

/* The outcome is certain before the hello's end: the walk goes there only for a report. */
static __always_inline long decide_early(struct tg_hello *hello, enum tg_outcome outcome)
{
	if (!report)
		return decide(hello, outcome);
	hello->outcome = outcome;
	hello->skip = hello->hello_left;
	return 0;
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

static __always_inline long leave_looked_at(struct tg_hello *hello)
{
	if ((hello->flags & TG_HELLO_SNI) && (hello->flags & TG_HELLO_ALPN))
		return decide_early(hello, TG_OTHER_HELLO);
	return leave_extension(hello);
}

/* An extension that is looked at, with a list in it. RFC 8446 4.2: there is only one of each. */
static __always_inline long enter_looked_at(struct tg_hello *hello, enum tg_hello_flag extension, enum tg_field list)
{
	if (hello->flags & extension)
		return contradict(hello);
	hello->flags |= extension;
	return hello->extension_left ? expect(hello, list, 2) : leave_looked_at(hello);
}

/* The headers are complete and consistent: from here on it is a ClientHello, and `left` bytes of it follow. */
static __always_inline long enter_hello(struct tg_prefix *prefix, __u32 left)
{
	struct tg_hello *hello = &prefix->hello;

	hello->hello_left = left;
	hello->flags |= TG_HELLO_HEADERS;
	if (hello->flags & TG_HELLO_SSLV2)
		return decide_early(hello, TG_OTHER_HELLO);
	if (is_mesh_port(prefix->port, prefix->profile))
		return decide_early(hello, TG_MESH_HELLO);
	return expect(hello, FIELD_VERSION, 2);
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
static __always_inline long read_field(struct tg_prefix *prefix)
{
	struct tg_hello *hello = &prefix->hello;
	__u32 number = hello->number;

	switch (hello->field) {
	case FIELD_SSLV2_LENGTH:
		hello->record_length = number & ~(SSLV2_FIRST << 8);
		hello->hello_left = hello->record_length;
		return expect(hello, FIELD_SSLV2_TYPE, 1);
	case FIELD_SSLV2_TYPE:
		if (number != MESSAGE_CLIENT_HELLO)
			return contradict(hello);
		return expect(hello, FIELD_SSLV2_VERSION, 2);
	case FIELD_SSLV2_VERSION:
		if (number != SSLV2_VERSION &&
		    (number >> 8 != RECORD_MAJOR || (number & 0xff) > RECORD_MINOR_MAX))
			return contradict(hello);
		return expect(hello, FIELD_SSLV2_CIPHERS, 2);
	case FIELD_SSLV2_CIPHERS:
		if (!number || number % SSLV2_CIPHER_LENGTH)
			return contradict(hello);
		hello->hello_left -= number;
		return expect(hello, FIELD_SSLV2_SESSION, 2);
	case FIELD_SSLV2_SESSION:
		if (number && number != SSLV2_SESSION_LENGTH)
			return contradict(hello);
		hello->hello_left -= number;
		return expect(hello, FIELD_SSLV2_CHALLENGE, 2);
	case FIELD_SSLV2_CHALLENGE:
		if (number < SSLV2_CHALLENGE_MIN || number > SSLV2_CHALLENGE_MAX)
			return contradict(hello);
		hello->hello_left -= number;
		if (hello->hello_left != SSLV2_HEADER_LENGTH - 2)
			return contradict(hello);
		hello->record_left = hello->record_length - hello->hello_left;
		return enter_hello(prefix, hello->record_left);
	case FIELD_MESSAGE_TYPE:
		if (number != MESSAGE_CLIENT_HELLO)
			return contradict(hello);
		return expect(hello, FIELD_MESSAGE_LENGTH, 3);
	case FIELD_MESSAGE_LENGTH:
		if (number < HELLO_LENGTH_MIN || number > HELLO_LENGTH_MAX || hello->record_left > number)
			return contradict(hello);
		return enter_hello(prefix, number);
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
		if (hello->extension == EXTENSION_SERVER_NAME)
			return enter_looked_at(hello, TG_HELLO_SNI, FIELD_SNI_LIST_LENGTH);
		if (hello->extension == EXTENSION_ALPN)
			return enter_looked_at(hello, TG_HELLO_ALPN, FIELD_ALPN_LIST_LENGTH);
		return leave_extension(hello);
	case FIELD_SNI_LIST_LENGTH:
		if (number != hello->extension_left)
			return contradict(hello);
		return expect(hello, FIELD_SNI_TYPE, 1);
	case FIELD_SNI_TYPE:
		if (number != SNI_HOST_NAME)
			return leave_looked_at(hello);
		return expect(hello, FIELD_SNI_LENGTH, 2);
	case FIELD_SNI_LENGTH:
		if (!number || number > hello->extension_left)
			return contradict(hello);
		if (number >= TG_NAME_BYTES)
			return leave_looked_at(hello);
		return expect_name(hello, FIELD_SNI, number);
	case FIELD_SNI:
		if (is_mesh_sni(hello, prefix->profile))
			return decide_early(hello, TG_MESH_HELLO);
		return leave_looked_at(hello);
	case FIELD_ALPN_LIST_LENGTH:
		if (number != hello->extension_left)
			return contradict(hello);
		return expect(hello, FIELD_ALPN_LENGTH, 1);
	case FIELD_ALPN_LENGTH:
		if (!number || number > hello->extension_left)
			return contradict(hello);
		return expect_name(hello, FIELD_ALPN, number);
	case FIELD_ALPN:
		if (is_mesh_alpn(hello, prefix->profile))
			return decide_early(hello, TG_MESH_HELLO);
		if (hello->extension_left)
			return expect(hello, FIELD_ALPN_LENGTH, 1);
		return leave_looked_at(hello);
	}
	return contradict(hello);
}

/* A hello may end before its extensions, or after any of them; anywhere else it is cut off. */
static __always_inline enum tg_outcome end_of_hello(const struct tg_hello *hello)
{
	if (hello->outcome != TG_MORE)
		return hello->outcome;
	if (hello->skip || hello->extension_left)
		return TG_BROKEN_HELLO;
	if (hello->field == FIELD_EXTENSIONS_LENGTH && hello->wanted == 2)
		return TG_OTHER_HELLO;
	if (hello->field == FIELD_EXTENSION_TYPE && hello->wanted == 2)
		return TG_OTHER_HELLO;
	return TG_BROKEN_HELLO;
}

static __always_inline __u8 lower(__u8 byte)
{
	return byte >= 'A' && byte <= 'Z' ? byte + 'a' - 'A' : byte;
}

/* The client's own bytes begin here; `byte` is the first. */
static __always_inline long begin_own(struct tg_hello *hello, __u8 byte)
{
	if (byte == RECORD_HANDSHAKE)
		return expect(hello, FIELD_MESSAGE_TYPE, 1);
	if (!(byte & SSLV2_FIRST))
		return decide(hello, TG_NOT_TLS);
	hello->flags |= TG_HELLO_SSLV2;
	hello->record_left = SSLV2_HEADER_LENGTH;
	return expect(hello, FIELD_SSLV2_LENGTH, 2);
}

static __always_inline long leave_proxy_header(struct tg_prefix *prefix)
{
	prefix->base = prefix->hello.position;
	return expect(&prefix->hello, FIELD_BASE, 1);
}

/* A step that is not yet in a hello; `available` bytes are known, from `byte` on. */
static __always_inline long walk_to_base(struct tg_prefix *prefix, __u8 byte, __u32 available)
{
	struct tg_hello *hello = &prefix->hello;
	enum tg_proxy proxy;
	__u32 bytes;

	switch (hello->field) {
	case FIELD_START:
		if (byte == PROXY_TEXT_FIRST)
			return expect(hello, FIELD_PROXY_TEXT, 1);
		if (byte == PROXY_BINARY_FIRST)
			return expect(hello, FIELD_PROXY_BINARY, 1);
		return expect(hello, FIELD_BASE, 1);
	case FIELD_BASE:
		return begin_own(hello, byte);
	case FIELD_PROXY_BODY:
		bytes = least(hello->skip, available);
		hello->skip -= bytes;
		hello->position += bytes;
		return hello->skip ? 0 : leave_proxy_header(prefix);
	}
	proxy = hello->field == FIELD_PROXY_TEXT ?
			proxy_text_byte(hello->position, hello->number, byte) :
			proxy_binary_byte(hello->position, hello->number, byte);
	if (proxy == PROXY_NONE)
		return decide(hello, TG_NOT_TLS);
	hello->position++;
	hello->number = hello->number << 8 | byte;
	if (proxy == PROXY_GOES_ON)
		return 0;
	hello->skip = hello->field == FIELD_PROXY_TEXT ? 0 : hello->number & 0xffff;
	hello->field = FIELD_PROXY_BODY;
	return hello->skip ? 0 : leave_proxy_header(prefix);
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
	byte = *byte_at(prefix, hello->position);
	if (hello->field <= FIELD_BASE)
		return walk_to_base(prefix, byte, available);
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
	return read_field(prefix);
}

/* Begins a walk, at the stream's start or where nothing but a ClientHello is looked for. */
static __always_inline void begin_walk(struct tg_hello *hello, enum tg_field field)
{
	__builtin_memset(hello, 0, offsetof(struct tg_hello, name));
	expect(hello, field, 1);
}

/* Walks on through prefix->bytes as far as they are known; the result also stays in prefix->hello. */
__noinline int walk(struct tg_prefix *prefix)
{
	if (prefix && !(prefix->hello.flags & TG_HELLO_ENDED))
		bpf_loop(WALK_TURNS, walk_step, &prefix, 0);
	return 0;
}

#endif
