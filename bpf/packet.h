/* SPDX-License-Identifier: (BSD-2-Clause OR GPL-2.0) */
/*
 * From a frame to a TCP segment. Headers are read with bpf_skb_load_bytes: on a veth the payload never is in the
 * linear part, and no header has to be. What cannot be read is counted and left alone.
 */
#ifndef TIDEGATE_PACKET_H
#define TIDEGATE_PACKET_H

#include <linux/if_ether.h>
#include <linux/in.h>
#include <linux/ip.h>
#include <linux/ipv6.h>
#include <linux/tcp.h>
#include <bpf/bpf_endian.h>

#include "maps.h"

enum {
	VLAN_TAGS_MAX = 2,
	EXTENSION_HEADERS_MAX = 8,
};

enum {
	IPV4_FRAGMENT = 0x3fff,		/* more fragments, and the offset */
	IPV6_FRAGMENT = 0xfff9,		/* the offset, and more fragments */
};

enum tcp_flag {
	TCP_FIN = 0x01,
	TCP_SYN = 0x02,
	TCP_RST = 0x04,
	TCP_ACK = 0x10,
};

struct tg_segment {
	__u8 source[16];
	__u8 destination[16];
	__u16 source_port;
	__u16 destination_port;
	__u32 sequence;		/* of the first payload byte */
	__u32 acknowledged;
	__u32 payload;		/* offset in the packet */
	__u32 length;		/* of the payload */
	__u8 flags;		/* enum tcp_flag */
};

struct vlan_tag {
	__be16 tci;
	__be16 protocol;
};

/* The first two bytes of every IPv6 extension header but the fragment header. */
struct extension_header {
	__u8 next;
	__u8 length;
};

struct fragment_header {
	__u8 next;
	__u8 reserved;
	__be16 fragment;
	__be32 identification;
};

static __always_inline int refuse(enum tg_counter counter)
{
	count(counter);
	return -1;
}

static __always_inline void map_ipv4(__u8 mapped[16], __be32 address)
{
	__u32 *words = (__u32 *)mapped;

	words[0] = 0;
	words[1] = 0;
	words[2] = bpf_htonl(0xffff);
	words[3] = address;
}

/* Reads the TCP header at offset; end is where the IP packet ends. */
static __always_inline int parse_tcp(struct __sk_buff *skb, __u32 offset, __u32 end,
				     struct tg_segment *segment)
{
	struct tcphdr tcp;
	__u32 header;

	if (bpf_skb_load_bytes(skb, offset, &tcp, sizeof(tcp)))
		return refuse(TG_BAD_HEADERS);
	header = tcp.doff * 4;
	if (header < sizeof(tcp) || offset + header > end)
		return refuse(TG_BAD_HEADERS);
	segment->source_port = bpf_ntohs(tcp.source);
	segment->destination_port = bpf_ntohs(tcp.dest);
	segment->flags = ((__u8 *)&tcp)[13];
	segment->sequence = bpf_ntohl(tcp.seq) + !!(segment->flags & TCP_SYN);
	segment->acknowledged = bpf_ntohl(tcp.ack_seq);
	segment->payload = offset + header;
	segment->length = end - offset - header;
	return 0;
}

static __always_inline int parse_ipv4(struct __sk_buff *skb, __u32 offset, struct tg_segment *segment)
{
	__u32 header, length;
	struct iphdr ip;

	if (bpf_skb_load_bytes(skb, offset, &ip, sizeof(ip)))
		return refuse(TG_BAD_HEADERS);
	header = ip.ihl * 4;
	if (ip.version != 4 || header < sizeof(ip))
		return refuse(TG_BAD_HEADERS);
	if (ip.protocol != IPPROTO_TCP)
		return refuse(TG_NOT_TCP);
	if (ip.frag_off & bpf_htons(IPV4_FRAGMENT))
		return refuse(TG_TCP_FRAGMENT);
	/* Super-segments of more than 64 KB (BIG TCP, Linux 6.3) have 0 here. */
	length = bpf_ntohs(ip.tot_len) ?: skb->len - offset;
	if (length < header || offset + length > skb->len)
		return refuse(TG_BAD_HEADERS);
	map_ipv4(segment->source, ip.saddr);
	map_ipv4(segment->destination, ip.daddr);
	return parse_tcp(skb, offset + header, offset + length, segment);
}

static __always_inline int parse_ipv6(struct __sk_buff *skb, __u32 offset, struct tg_segment *segment)
{
	struct extension_header extension;
	struct fragment_header fragment;
	struct ipv6hdr ip;
	__u32 end;
	__u8 next;
	int i;

	if (bpf_skb_load_bytes(skb, offset, &ip, sizeof(ip)))
		return refuse(TG_BAD_HEADERS);
	if (ip.version != 6)
		return refuse(TG_BAD_HEADERS);
	__builtin_memcpy(segment->source, &ip.saddr, sizeof(segment->source));
	__builtin_memcpy(segment->destination, &ip.daddr, sizeof(segment->destination));
	/* Jumbograms and BIG TCP (Linux 5.19) have 0 here. */
	end = ip.payload_len ? offset + sizeof(ip) + bpf_ntohs(ip.payload_len) : skb->len;
	if (end > skb->len)
		return refuse(TG_BAD_HEADERS);
	offset += sizeof(ip);
	next = ip.nexthdr;
	for (i = 0; i < EXTENSION_HEADERS_MAX; i++) {
		if (next == IPPROTO_FRAGMENT) {
			if (bpf_skb_load_bytes(skb, offset, &fragment, sizeof(fragment)))
				return refuse(TG_BAD_HEADERS);
			/* RFC 6946: an atomic fragment is a whole packet. */
			if (fragment.fragment & bpf_htons(IPV6_FRAGMENT))
				return refuse(fragment.next == IPPROTO_UDP ||
					      fragment.next == IPPROTO_ICMPV6 ?
					      TG_NOT_TCP : TG_TCP_FRAGMENT);
			next = fragment.next;
			offset += sizeof(fragment);
			continue;
		}
		if (next != IPPROTO_HOPOPTS && next != IPPROTO_ROUTING && next != IPPROTO_DSTOPTS &&
		    next != IPPROTO_MH && next != IPPROTO_AH)
			break;
		if (bpf_skb_load_bytes(skb, offset, &extension, sizeof(extension)))
			return refuse(TG_BAD_HEADERS);
		/* RFC 4302 2.2: AH alone counts its length in words of four bytes, less two. */
		offset += next == IPPROTO_AH ? (extension.length + 2) * 4
					     : (extension.length + 1) * 8;
		next = extension.next;
	}
	if (next == IPPROTO_TCP)
		return parse_tcp(skb, offset, end, segment);
	return refuse(i == EXTENSION_HEADERS_MAX ? TG_TOO_MANY_HEADERS : TG_NOT_TCP);
}

/* Returns 0 with the segment filled in, or -1 for anything that is not a whole TCP segment. */
static __always_inline int parse_packet(struct __sk_buff *skb, struct tg_segment *segment)
{
	__u32 offset = sizeof(struct ethhdr);
	struct vlan_tag vlan;
	struct ethhdr eth;
	__be16 protocol;
	int i;

	if (bpf_skb_load_bytes(skb, 0, &eth, sizeof(eth)))
		return refuse(TG_BAD_HEADERS);
	protocol = eth.h_proto;
	for (i = 0; i < VLAN_TAGS_MAX; i++) {
		if (protocol != bpf_htons(ETH_P_8021Q) && protocol != bpf_htons(ETH_P_8021AD))
			break;
		if (bpf_skb_load_bytes(skb, offset, &vlan, sizeof(vlan)))
			return refuse(TG_BAD_HEADERS);
		protocol = vlan.protocol;
		offset += sizeof(vlan);
	}
	if (protocol == bpf_htons(ETH_P_IP))
		return parse_ipv4(skb, offset, segment);
	if (protocol == bpf_htons(ETH_P_IPV6))
		return parse_ipv6(skb, offset, segment);
	return refuse(i == VLAN_TAGS_MAX ? TG_TOO_MANY_HEADERS : TG_NOT_IP);
}

#endif
