/* SPDX-License-Identifier: (BSD-2-Clause OR GPL-2.0) */
/*
 * From a packet to a TCP segment and the flow that it belongs to. The usual headers (Ethernet or nothing, IPv4 without
 * options or IPv6 without extension headers, TCP), where they are in the linear part of the packet, are read where they
 * are. Everything else is read with bpf_skb_load_bytes: on a veth the payload never is in the linear part, and no
 * header has to be. What cannot be read is counted and left alone.
 */
#ifndef TIDEGATE_PACKET_H
#define TIDEGATE_PACKET_H

#include <linux/if_ether.h>
#include <linux/in.h>
#include <linux/ip.h>
#include <linux/ipv6.h>
#include <linux/tcp.h>
#include <bpf/bpf_endian.h>

#include "flows.h"
#include "maps.h"

enum {
	VLAN_TAGS_MAX = 2,
	EXTENSION_HEADERS_MAX = 8,
	LINEAR_HEADERS_MAX = 4,		/* of those, in the linear part and of the usual kinds */
};

/* The kinds of extension headers that are passed over where they are, as bits. */
#define LINEAR_HEADERS (1ULL << IPPROTO_HOPOPTS | 1ULL << IPPROTO_ROUTING | 1ULL << IPPROTO_DSTOPTS)

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

enum way {
	FROM_POD,
	TO_POD,
};

/* Bytes in front of the IP header: 14, or 0 on an interface that carries bare IP packets (tun, WireGuard). */
const volatile __u32 link_header = sizeof(struct ethhdr);

struct tg_segment {
	__u32 sequence;		/* of the first payload byte */
	__u32 acknowledged;
	__u32 payload;		/* offset in the packet */
	__u32 length;		/* of the payload */
	__u32 packets;		/* as many as it is on the wire */
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

static __always_inline void put_ipv4(__u8 mapped[16], __be32 address)
{
	key_word *words = (key_word *)mapped;

	words[0] = 0;
	words[1] = one_word(bpf_htonl(0xffff), address);
}

static __always_inline void put_ipv6(__u8 address[16], const struct in6_addr *found)
{
	const key_word *from = (const key_word *)found;
	key_word *words = (key_word *)address;

	words[0] = from[0];
	words[1] = from[1];
}

/* A TCP header that is at offset; end is where the IP packet ends. */
static __always_inline int take_tcp(const struct tcphdr *tcp, __u32 offset, __u32 end, enum way way,
				    struct tg_flow_key *key, struct tg_segment *segment)
{
	__u32 header = tcp->doff * 4;
	__u32 payload = offset + header;
	__u32 ports;

	if (header < sizeof(*tcp) || payload > end)
		return refuse(TG_BAD_HEADERS);
	ports = bpf_ntohl(*(const __be32 *)tcp);
	key->ports = way == FROM_POD ? ports : (__u32)(ports << 16) | ports >> 16;
	segment->flags = ((__u8 *)tcp)[13];
	segment->sequence = bpf_ntohl(tcp->seq) + !!(segment->flags & TCP_SYN);
	segment->acknowledged = bpf_ntohl(tcp->ack_seq);
	segment->payload = payload;
	/* What a RST carries is not of the stream: RFC 1122 4.2.2.12. */
	segment->length = segment->flags & TCP_RST ? 0 : end - payload;
	return 0;
}

/* An IPv4 header at offset; sets where the packet ends. */
static __always_inline int take_ipv4(const struct __sk_buff *skb, const struct iphdr *ip, __u32 offset,
				     enum way way, struct tg_flow_key *key, __u32 *end)
{
	/* Super-segments of more than 64 KB (BIG TCP, Linux 6.3) have 0 here. */
	__u32 length = bpf_ntohs(ip->tot_len) ?: skb->len - offset;

	if (length < ip->ihl * 4 || offset + length > skb->len)
		return refuse(TG_BAD_HEADERS);
	put_ipv4(key->local, way == FROM_POD ? ip->saddr : ip->daddr);
	put_ipv4(key->peer, way == FROM_POD ? ip->daddr : ip->saddr);
	*end = offset + length;
	return 0;
}

/* An IPv6 header at offset; sets where the packet ends. */
static __always_inline int take_ipv6(const struct __sk_buff *skb, const struct ipv6hdr *ip, __u32 offset,
				     enum way way, struct tg_flow_key *key, __u32 *end)
{
	/* Jumbograms and BIG TCP (Linux 5.19) have 0 here. */
	*end = ip->payload_len ? offset + sizeof(*ip) + bpf_ntohs(ip->payload_len) : skb->len;
	if (*end > skb->len)
		return refuse(TG_BAD_HEADERS);
	put_ipv6(key->local, way == FROM_POD ? &ip->saddr : &ip->daddr);
	put_ipv6(key->peer, way == FROM_POD ? &ip->daddr : &ip->saddr);
	return 0;
}

static __always_inline int parse_tcp(struct __sk_buff *skb, __u32 offset, __u32 end, enum way way,
				     struct tg_flow_key *key, struct tg_segment *segment)
{
	struct tcphdr tcp;

	if (bpf_skb_load_bytes(skb, offset, &tcp, sizeof(tcp)))
		return refuse(TG_BAD_HEADERS);
	return take_tcp(&tcp, offset, end, way, key, segment);
}

static __always_inline int parse_ipv4(struct __sk_buff *skb, __u32 offset, enum way way,
				      struct tg_flow_key *key, struct tg_segment *segment)
{
	struct iphdr ip;
	__u32 end;

	if (bpf_skb_load_bytes(skb, offset, &ip, sizeof(ip)))
		return refuse(TG_BAD_HEADERS);
	if (ip.version != 4 || ip.ihl * 4 < sizeof(ip))
		return refuse(TG_BAD_HEADERS);
	if (ip.protocol != IPPROTO_TCP)
		return refuse(TG_NOT_TCP);
	if (ip.frag_off & bpf_htons(IPV4_FRAGMENT))
		return refuse(TG_TCP_FRAGMENT);
	if (take_ipv4(skb, &ip, offset, way, key, &end))
		return -1;
	return parse_tcp(skb, offset + ip.ihl * 4, end, way, key, segment);
}

static __always_inline int parse_ipv6(struct __sk_buff *skb, __u32 offset, enum way way,
				      struct tg_flow_key *key, struct tg_segment *segment)
{
	struct extension_header extension;
	struct fragment_header fragment;
	struct ipv6hdr ip __attribute__((aligned(8)));
	__u32 end;
	__u8 next;
	int i;

	if (bpf_skb_load_bytes(skb, offset, &ip, sizeof(ip)) || ip.version != 6)
		return refuse(TG_BAD_HEADERS);
	if (take_ipv6(skb, &ip, offset, way, key, &end))
		return -1;
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
		return parse_tcp(skb, offset, end, way, key, segment);
	return refuse(i == EXTENSION_HEADERS_MAX ? TG_TOO_MANY_HEADERS : TG_NOT_TCP);
}

/* The ethertype that the first byte of a bare IP packet stands for, 0 for none. */
static __always_inline __be16 bare_protocol(__u8 first)
{
	switch (first >> 4) {
	case 4:
		return bpf_htons(ETH_P_IP);
	case 6:
		return bpf_htons(ETH_P_IPV6);
	}
	return 0;
}

/* Reads headers of any kind, wherever they are. */
__noinline int parse_any(struct __sk_buff *skb, enum way way, struct tg_flow_key *key,
			 struct tg_segment *segment)
{
	__u32 offset = link_header;
	struct vlan_tag vlan;
	struct ethhdr eth;
	__be16 protocol;
	__u8 first;
	int i = 0;

	if (!key || !segment)
		return -1;
	if (link_header) {
		if (bpf_skb_load_bytes(skb, 0, &eth, sizeof(eth)))
			return refuse(TG_BAD_HEADERS);
		protocol = eth.h_proto;
	} else {
		if (bpf_skb_load_bytes(skb, 0, &first, sizeof(first)))
			return refuse(TG_BAD_HEADERS);
		protocol = bare_protocol(first);
	}
	for (; i < VLAN_TAGS_MAX; i++) {
		if (protocol != bpf_htons(ETH_P_8021Q) && protocol != bpf_htons(ETH_P_8021AD))
			break;
		if (bpf_skb_load_bytes(skb, offset, &vlan, sizeof(vlan)))
			return refuse(TG_BAD_HEADERS);
		protocol = vlan.protocol;
		offset += sizeof(vlan);
	}
	if (protocol == bpf_htons(ETH_P_IP))
		return parse_ipv4(skb, offset, way, key, segment);
	if (protocol == bpf_htons(ETH_P_IPV6))
		return parse_ipv6(skb, offset, way, key, segment);
	return refuse(i == VLAN_TAGS_MAX ? TG_TOO_MANY_HEADERS : TG_NOT_IP);
}

/* Reads IPv6 headers that are in the linear part; hands over what is not or is rarer. */
__noinline int parse_linear_ipv6(struct __sk_buff *skb, enum way way, struct tg_flow_key *key,
				 struct tg_segment *segment)
{
	void *data = (void *)(long)skb->data, *data_end = (void *)(long)skb->data_end;
	struct ipv6hdr *ip = data + link_header;
	__u32 offset = link_header + sizeof(*ip), end;
	struct extension_header *extension;
	struct tcphdr *tcp;
	__u8 next;
	int i;

	if (!key || !segment)
		return -1;
	if ((void *)(ip + 1) > data_end || ip->version != 6)
		return parse_any(skb, way, key, segment);
	next = ip->nexthdr;
	for (i = 0; next != IPPROTO_TCP; i++) {
		extension = data + offset;
		if (i == LINEAR_HEADERS_MAX || (void *)(extension + 1) > data_end ||
		    next > IPPROTO_DSTOPTS || !(LINEAR_HEADERS >> next & 1))
			return parse_any(skb, way, key, segment);
		offset += (extension->length + 1) * 8;
		next = extension->next;
	}
	tcp = data + offset;
	if ((void *)(tcp + 1) > data_end)
		return parse_any(skb, way, key, segment);
	if (take_ipv6(skb, ip, link_header, way, key, &end))
		return -1;
	return take_tcp(tcp, offset, end, way, key, segment);
}

/* Fills in the segment and, but for the interface, the key; -1 for anything that is not a whole TCP segment. */
static __always_inline int parse_packet(struct __sk_buff *skb, enum way way, struct tg_flow_key *key,
					struct tg_segment *segment)
{
	void *data = (void *)(long)skb->data, *data_end = (void *)(long)skb->data_end;
	struct iphdr *ip = data + link_header;
	__be16 protocol;
	__u32 end;

	if ((void *)(ip + 1) + sizeof(struct tcphdr) > data_end)
		return parse_any(skb, way, key, segment);
	protocol = link_header ? ((struct ethhdr *)data)->h_proto : bare_protocol(*(__u8 *)data);
	if (protocol == bpf_htons(ETH_P_IP) && ip->version == 4 && ip->ihl == 5 &&
	    ip->protocol == IPPROTO_TCP && !(ip->frag_off & bpf_htons(IPV4_FRAGMENT))) {
		if (take_ipv4(skb, ip, link_header, way, key, &end))
			return -1;
		return take_tcp((void *)(ip + 1), link_header + sizeof(*ip), end, way, key, segment);
	}
	if (protocol == bpf_htons(ETH_P_IPV6))
		return parse_linear_ipv6(skb, way, key, segment);
	return parse_any(skb, way, key, segment);
}

#endif
