/* SPDX-License-Identifier: (BSD-2-Clause OR GPL-2.0) */
/*
 * Which protocol a stream that is not TLS speaks, where its first bytes leave no doubt. A hint tells a person what
 * there is to be migrated; it never changes a class.
 *
 * One function per protocol says yes, no or that it wants more bytes. Where two could say yes, the one that needs
 * fewer bytes comes first, so that it makes no difference how the stream was cut.
 */
#ifndef TIDEGATE_HINTS_H
#define TIDEGATE_HINTS_H

#include "prefix.h"

/* A bit each, see find_hint. */
enum tg_answer {
	ANSWER_NO,
	ANSWER_MORE = 1 << 0,
	ANSWER_YES = 1 << 1,
};

enum {
	LF = '\n',
	CR = '\r',
	POSTGRES_CANCEL = 80877102,	/* CANCEL_REQUEST_CODE of libpq/pqcomm.h, and so on */
	POSTGRES_SSL = 80877103,
	POSTGRES_GSSENC = 80877104,
	POSTGRES_STARTUP_MAX = 10000,
	MYSQL_LOGIN = 32,		/* bytes of an SSLRequest, and of what every login begins with */
	MYSQL_HEADER = 4,
	MYSQL_PROTOCOL_41 = 0x200,
	MYSQL_SSL = 0x800,
	KAFKA_API_VERSIONS = 18,
	KAFKA_METADATA = 3,
	MONGODB_MSG = 2013,
	MONGODB_QUERY = 2004,
	CASSANDRA_STARTUP = 1,
	CASSANDRA_OPTIONS = 5,
};

/* The client's bytes from its own first one on, as far as they are known without a gap. */
struct known {
	struct tg_prefix *prefix;
	__u32 length;
};

static __always_inline __u8 at(const struct known *known, __u32 index)
{
	return *byte_at(known->prefix, known->prefix->base + index);
}

static __always_inline __u32 be16(const struct known *known, __u32 index)
{
	return at(known, index) << 8 | at(known, index + 1);
}

static __always_inline __u32 be32(const struct known *known, __u32 index)
{
	return be16(known, index) << 16 | be16(known, index + 2);
}

static __always_inline __u32 le32(const struct known *known, __u32 index)
{
	return __builtin_bswap32(be32(known, index));
}

/* Whether the bytes from index on are those of a text; as far as they are known. */
static __always_inline enum tg_answer is_text(const struct known *known, __u32 index, const char *text,
					      __u32 length)
{
	__u32 i;

#pragma unroll
	for (i = 0; i < length; i++) {
		if (index + i >= known->length)
			return ANSWER_MORE;
		if (at(known, index + i) != (__u8)text[i])
			return ANSWER_NO;
	}
	return ANSWER_YES;
}

#define TEXT(known, index, text) is_text(known, index, text, sizeof(text) - 1)

static __always_inline enum tg_answer is_postgres(const struct known *known)
{
	__u32 length, code;

	if (known->length && at(known, 0))
		return ANSWER_NO;
	if (known->length < 8)
		return ANSWER_MORE;
	length = be32(known, 0);
	code = be32(known, 4);
	if (length == 8 && (code == POSTGRES_SSL || code == POSTGRES_GSSENC))
		return ANSWER_YES;
	if (length == 16 && code == POSTGRES_CANCEL)
		return ANSWER_YES;
	if (code >> 16 != 3 || (code & 0xffff) > 2 || length <= 8 || length > POSTGRES_STARTUP_MAX)
		return ANSWER_NO;
	if (known->length < 9)
		return ANSWER_MORE;
	return at(known, 8) >= 'a' && at(known, 8) <= 'z' ? ANSWER_YES : ANSWER_NO;
}

static __always_inline enum tg_answer is_cassandra(const struct known *known)
{
	__u32 length;

	if (known->length && (at(known, 0) < 3 || at(known, 0) > 5))
		return ANSWER_NO;
	if (known->length < 9)
		return ANSWER_MORE;
	if (at(known, 1) & ~0x1f)
		return ANSWER_NO;
	length = be32(known, 5);
	if (at(known, 4) == CASSANDRA_OPTIONS)
		return length ? ANSWER_NO : ANSWER_YES;
	if (at(known, 4) != CASSANDRA_STARTUP || length < 22 || length > 1024)
		return ANSWER_NO;
	if (known->length < 13)
		return ANSWER_MORE;
	return be16(known, 11) == 11 ? TEXT(known, 13, "CQL_VERSION") : ANSWER_NO;
}

static __always_inline enum tg_answer is_ssh(const struct known *known)
{
	enum tg_answer answer = TEXT(known, 0, "SSH-");

	if (answer != ANSWER_YES)
		return answer;
	answer = TEXT(known, 4, "2.0-");
	return answer == ANSWER_NO ? TEXT(known, 4, "1.99-") : answer;
}

static __always_inline enum tg_answer is_amqp(const struct known *known)
{
	enum tg_answer answer = TEXT(known, 0, "AMQP");
	__u32 version;

	if (answer != ANSWER_YES)
		return answer;
	if (known->length < 8)
		return ANSWER_MORE;
	version = be32(known, 4);
	return version == 0x00000901 || version == 0x00010000 || version == 0x02010000 ||
	       version == 0x03010000 || version == 0x0101000a ? ANSWER_YES : ANSWER_NO;
}

static __always_inline enum tg_answer is_kafka(const struct known *known)
{
	__u32 size, api, version, client;

	if (known->length && at(known, 0))
		return ANSWER_NO;
	if (known->length < 14)
		return ANSWER_MORE;
	size = be32(known, 0);
	api = be16(known, 4);
	version = be16(known, 6);
	client = be16(known, 12);
	if (size <= 10 || size >= 1 << 20)
		return ANSWER_NO;
	if ((api != KAFKA_API_VERSIONS || version > 4) && (api != KAFKA_METADATA || version > 13))
		return ANSWER_NO;
	if (client == 0xffff)
		return ANSWER_YES;
	return client <= 255 && 10 + client <= size ? ANSWER_YES : ANSWER_NO;
}

/* From one to `most` digits, then CR and LF; moves index behind them. */
static __always_inline enum tg_answer is_number_line(const struct known *known, __u32 *index, __u32 most)
{
	__u32 i, digits = 0;
	__u8 byte;

	for (i = 0; i <= most; i++) {
		if (*index >= known->length)
			return ANSWER_MORE;
		byte = at(known, *index);
		if (byte < '0' || byte > '9')
			break;
		digits++;
		(*index)++;
	}
	if (!digits || digits > most)
		return ANSWER_NO;
	if (at(known, *index) != CR)
		return ANSWER_NO;
	if (*index + 1 >= known->length)
		return ANSWER_MORE;
	if (at(known, *index + 1) != LF)
		return ANSWER_NO;
	*index += 2;
	return ANSWER_YES;
}

static __always_inline enum tg_answer is_redis(const struct known *known)
{
	enum tg_answer answer;
	__u32 index = 1;

	if (known->length && at(known, 0) != '*')
		return ANSWER_NO;
	answer = is_number_line(known, &index, 4);
	if (answer != ANSWER_YES)
		return answer;
	if (index >= known->length)
		return ANSWER_MORE;
	if (at(known, index) != '$')
		return ANSWER_NO;
	index++;
	return is_number_line(known, &index, 9);
}

static __always_inline enum tg_answer is_mongodb(const struct known *known)
{
	__u32 length, opcode;

	if (known->length < 4)
		return ANSWER_MORE;
	length = le32(known, 0);
	if (length < 21 || length > 48000000)
		return ANSWER_NO;
	if (known->length < 16)
		return ANSWER_MORE;
	if (le32(known, 8))
		return ANSWER_NO;
	opcode = le32(known, 12);
	if (opcode == MONGODB_QUERY)
		return TEXT(known, 20, "admin.$cmd\0");
	if (opcode != MONGODB_MSG)
		return ANSWER_NO;
	if (known->length < 20)
		return ANSWER_MORE;
	return le32(known, 16) & ~0x10003 ? ANSWER_NO : ANSWER_YES;
}

/* Of a stream whose server began. */
static __always_inline enum tg_answer is_mysql(const struct known *known)
{
	__u32 i;

	if (known->length < MYSQL_HEADER)
		return ANSWER_MORE;
	if (at(known, 3) != 1 || (le32(known, 0) & 0xffffff) < MYSQL_LOGIN)
		return ANSWER_NO;
	if (known->length < MYSQL_LOGIN)
		return ANSWER_MORE;
	if (!(le32(known, 4) & MYSQL_PROTOCOL_41))
		return ANSWER_NO;
	for (i = 13; i < MYSQL_LOGIN; i++)
		if (at(known, i))
			return ANSWER_NO;
	return ANSWER_YES;
}

static __always_inline enum tg_answer is_h2c(const struct known *known)
{
	return TEXT(known, 0, "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n");
}

static __always_inline enum tg_answer is_http_method(const struct known *known)
{
	switch (at(known, 0)) {
	case 'G':
		return TEXT(known, 0, "GET ");
	case 'H':
		return TEXT(known, 0, "HEAD ");
	case 'D':
		return TEXT(known, 0, "DELETE ");
	case 'C':
		return TEXT(known, 0, "CONNECT ");
	case 'O':
		return TEXT(known, 0, "OPTIONS ");
	case 'T':
		return TEXT(known, 0, "TRACE ");
	case 'P':
		if (known->length < 2)
			return ANSWER_MORE;
		if (at(known, 1) == 'O')
			return TEXT(known, 0, "POST ");
		if (at(known, 1) == 'U')
			return TEXT(known, 0, "PUT ");
		return TEXT(known, 0, "PATCH ");
	}
	return ANSWER_NO;
}

static long search_line_end(__u32 turn, struct known *known)
{
	struct tg_prefix *prefix = known->prefix;

	if (prefix->searched >= known->length || at(known, prefix->searched) == LF)
		return 1;
	prefix->searched++;
	return 0;
}

static __always_inline enum tg_answer is_http1(struct known *known)
{
	enum tg_answer answer;
	__u32 end;

	if (!known->length)
		return ANSWER_MORE;
	answer = is_http_method(known);
	if (answer != ANSWER_YES)
		return answer;
	bpf_loop(TG_HINT_BYTES + 1, search_line_end, known, 0);
	end = known->prefix->searched;
	if (end >= known->length)
		return ANSWER_MORE;
	if (end && at(known, end - 1) == CR)
		end--;
	if (end < sizeof(" HTTP/1.1") - 1)
		return ANSWER_NO;
	if (TEXT(known, end - 9, " HTTP/1.") != ANSWER_YES)
		return ANSWER_NO;
	return at(known, end - 1) == '0' || at(known, end - 1) == '1' ? ANSWER_YES : ANSWER_NO;
}

static __always_inline __u32 hint_length(const struct tg_prefix *prefix)
{
	return least(prefix->have - prefix->base, TG_HINT_BYTES);
}

/*
 * A global function of each protocol. The verifier looks at such a function once, and not again behind every
 * answer that the ones before it could have given: with static ones, two thirds of its work were these.
 */
#define ANSWERS(protocol)							\
	__noinline int answer_##protocol(struct tg_prefix *prefix, __u32 length)	\
	{									\
		struct known known = { .prefix = prefix, .length = length };	\
										\
		return prefix ? is_##protocol(&known) : ANSWER_NO;		\
	}

ANSWERS(postgres)
ANSWERS(cassandra)
ANSWERS(ssh)
ANSWERS(amqp)
ANSWERS(kafka)
ANSWERS(redis)
ANSWERS(mongodb)
ANSWERS(h2c)
ANSWERS(mysql)
ANSWERS(http1)

#undef ANSWERS

/*
 * Returns the hint, TG_HINT_NONE when there will be none, or -1 when that takes more bytes. Who is asked first has the
 * lower bits. That there is no branch between two questions saves the verifier all their combinations.
 */
__noinline int find_hint(struct tg_prefix *prefix, int server_first)
{
	__u64 yes = 0, more = 0, hints = 0;
	__u32 length, asked = 0;

	if (!prefix)
		return TG_HINT_NONE;
	length = hint_length(prefix);

#define ASK(protocol, hint)								\
	do {										\
		__u64 answer = answer_##protocol(prefix, length);			\
											\
		yes |= (answer >> 1 & 1) << asked;					\
		more |= answer & 1;							\
		hints |= (__u64)(hint) << asked;					\
		asked += 4;								\
	} while (0)

	ASK(postgres, TG_HINT_POSTGRES);
	ASK(cassandra, TG_HINT_CASSANDRA);
	ASK(ssh, TG_HINT_SSH);
	ASK(amqp, TG_HINT_AMQP);
	ASK(kafka, TG_HINT_KAFKA);
	ASK(redis, TG_HINT_REDIS);
	ASK(mongodb, TG_HINT_MONGODB);
	ASK(h2c, TG_HINT_H2C);
	if (server_first)
		ASK(mysql, TG_HINT_MYSQL);
	ASK(http1, TG_HINT_HTTP1);

#undef ASK

	if (yes)
		return hints >> trailing_zeros(yes) & 0xf;
	return more && length < TG_HINT_BYTES ? -1 : TG_HINT_NONE;
}

/* MySQL's client goes on with TLS behind a login that is cut short, without a word from the server. */
static __always_inline int mysql_turns_to_tls(struct tg_prefix *prefix)
{
	struct known known = { .prefix = prefix, .length = hint_length(prefix) };
	__u32 both = MYSQL_PROTOCOL_41 | MYSQL_SSL;

	return known.length >= 8 && le32(&known, 0) == (MYSQL_LOGIN | 1 << 24) &&
	       (le32(&known, 4) & both) == both;
}

#endif
