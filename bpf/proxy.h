/* SPDX-License-Identifier: (BSD-2-Clause OR GPL-2.0) */
/*
 * A header of the PROXY protocol in front of the client's own bytes
 * (https://www.haproxy.org/download/2.8/doc/proxy-protocol.txt, 2.1 and 2.2), byte by byte. What a load balancer says
 * about the client it speaks for is not the client's.
 */
#ifndef TIDEGATE_PROXY_H
#define TIDEGATE_PROXY_H

#include "maps.h"

enum {
	PROXY_TEXT_MAX = 107,		/* with CR and LF */
	PROXY_BINARY_MAX = 4080,	/* of what follows the fixed header */
	PROXY_BINARY_HEADER = 16,
	PROXY_TEXT_FIRST = 'P',
	PROXY_BINARY_FIRST = '\r',
};

enum tg_proxy {
	PROXY_GOES_ON,
	PROXY_COMPLETE,
	PROXY_NONE,
};

/* "PROXY ", and then anything up to the line's end. `last` is the byte before this one. */
static __always_inline enum tg_proxy proxy_text_byte(__u32 position, __u8 last, __u8 byte)
{
	const __u64 text = 0x50524f585920;

	if (position < 6)
		return byte == (__u8)(text >> (5 - position) * 8) ? PROXY_GOES_ON : PROXY_NONE;
	if (last == '\r' && byte == '\n')
		return PROXY_COMPLETE;
	return position + 1 < PROXY_TEXT_MAX ? PROXY_GOES_ON : PROXY_NONE;
}

/* The signature, version and command, family and transport, length of what follows; `last` likewise. */
static __always_inline enum tg_proxy proxy_binary_byte(__u32 position, __u8 last, __u8 byte)
{
	const __u64 beginning = 0x0d0a0d0a000d0a51;
	const __u64 end = 0x5549540a;
	int fits;

	if (position < 8)
		fits = byte == (__u8)(beginning >> (7 - position) * 8);
	else if (position < 12)
		fits = byte == (__u8)(end >> (11 - position) * 8);
	else if (position == 12)
		fits = byte == 0x20 || byte == 0x21;
	else if (position == 13)
		fits = byte == 0 || (byte >> 4 >= 1 && byte >> 4 <= 2 && (byte & 0xf) >= 1 && (byte & 0xf) <= 2) ||
		       byte == 0x31 || byte == 0x32;
	else
		fits = position == 14 || (last << 8 | byte) <= PROXY_BINARY_MAX;
	if (!fits)
		return PROXY_NONE;
	return position == PROXY_BINARY_HEADER - 1 ? PROXY_COMPLETE : PROXY_GOES_ON;
}

#endif
