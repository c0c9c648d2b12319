// SPDX-License-Identifier: (BSD-2-Clause OR GPL-2.0)
/*
 * The classifier, given another packet in each repetition of a program test run: one field of the packet counts up.
 * Without that every repetition but the first would be a retransmission, which is cheaper than a packet.
 */
#include <linux/pkt_cls.h>

#include "../../bpf/classifier.bpf.c"

const volatile __u32 step_at = 0;	/* offset of the field in the packet */
const volatile __u32 step_by = 0;

static __always_inline void step(struct __sk_buff *skb)
{
	__be32 *field = (void *)(long)skb->data + step_at;

	if ((void *)(field + 1) <= (void *)(long)skb->data_end)
		*field = bpf_htonl(bpf_ntohl(*field) + step_by);
}

SEC("tc")
int nothing(struct __sk_buff *skb)
{
	return NEXT_PROGRAM;
}

/* One look-up in the flow map, and nothing else. */
SEC("tc")
int only_find(struct __sk_buff *skb)
{
	__u64 hash = 0;

	return bpf_map_lookup_elem(&flows, &hash) ? TC_ACT_OK : NEXT_PROGRAM;
}

/* One atomic addition, and nothing else but finding where. */
SEC("tc")
int only_add(struct __sk_buff *skb)
{
	struct tg_edge *edge = overflow_of(TG_EMPTY);

	if (edge)
		add(&edge->tally[TG_CLIENT], 1);
	return NEXT_PROGRAM;
}

SEC("tc")
int only_step(struct __sk_buff *skb)
{
	step(skb);
	return NEXT_PROGRAM;
}

SEC("tc")
int step_and_observe(struct __sk_buff *skb)
{
	step(skb);
	return observe(skb, FROM_POD);
}

SEC("tc")
int step_and_observe_to_pod(struct __sk_buff *skb)
{
	step(skb);
	return observe(skb, TO_POD);
}
