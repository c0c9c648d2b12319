/* SPDX-License-Identifier: (BSD-2-Clause OR GPL-2.0) */
/*
 * Who talks to whom, and how. A connection is on exactly one edge at any time: on the edge of class empty from its
 * SYN on, and moved, with all its bytes, when its class changes. So the sum over all edges and the overflow is the
 * number of connections that were opened and of bytes that they carried.
 *
 * Several processors may be at work on one flow at once. Why nothing is lost or counted twice:
 *
 * - What a flow has put on edges are three tallies: payload of either side, and the connection (1). Each is one word
 *   that holds how much, and where (enum tg_place). It only changes by compare-and-swap, and whoever changed it, and
 *   nobody else, then does to the edges what the change says: add what was gained to the place that the word named, or
 *   add everything to the new place and subtract it from the old. Additions are atomic and may come in any order, so
 *   when all programs have ended, each edge has exactly what the words of its flows say. Until then an edge can be
 *   off by what is under way, also below zero: counts are signed.
 * - The verdict says where the tallies belong. Who changed it brings them there; so does anybody who, behind an
 *   addition, finds that a tally is elsewhere. bring looks at the verdict again at its end: the last one to change
 *   it finds nobody who could still put a tally where an older verdict wanted it.
 * - An edge's slot is taken by the one processor whose insertion into edge_slots succeeded; others give theirs back
 *   and take that one. Nobody else knows a slot before it is inserted.
 * - A flow remembers its edge by slot and generation. User space forgets an edge by removing its key, then raising the
 *   generation, and then waits until every program that may have seen the old one has ended (an RCU grace period)
 *   before it tells the last counts and gives the slot back. A flow that comes later finds another generation, and
 *   the edge is made anew; what leaves it then has been counted on its former life, and makes it negative.
 * - Where an edge finds no slot, the tally is in the overflow of its class, and its place says so. With each packet that
 *   brings payload the edge is tried again. Only if an edge is forgotten under a living flow and finds no slot
 *   again, the flow's tally is split between the two; their sum is right.
 * - A flow that is evicted leaves its tallies where they are. Its memory may become another flow's while a program is
 *   still at work on it: then bytes may be counted on the wrong edge, but each once.
 */
#ifndef TIDEGATE_EDGES_H
#define TIDEGATE_EDGES_H

#include "maps.h"
#include "packet.h"

enum {
	/* A verdict changes a few times in a flow's life; who loses against all of them is late anyway. */
	SETTLE_TRIES = 4,
	/* Each failure means that another processor has done its part. */
	TALLY_TRIES = 8,
	BRING_TRIES = 3,
	/* RFC 7323 2.3: no window is larger. */
	WINDOW_MAX = 1 << 30,
};

#define TALLY_AMOUNT ((1ULL << TG_PLACE_SHIFT) - 1)
#define NO_SEAT (~0ULL)

static __always_inline enum tg_class flow_class(const struct tg_flow *flow)
{
	return *(volatile __u32 *)&flow->verdict & TG_VERDICT_CLASS;
}

static __always_inline int is_settled(const struct tg_flow *flow)
{
	return flow->verdict & TG_VERDICT_SETTLED;
}

static __always_inline int is_decided(const struct tg_flow *flow)
{
	return flow->verdict & (TG_VERDICT_DECIDED | TG_VERDICT_SETTLED);
}

static __always_inline void set_flag(struct tg_flow *flow, enum tg_flow_flag flag)
{
	__sync_fetch_and_or(&flow->flags, flag);
}

static __always_inline __u64 tally_of(const struct tg_flow *flow, __u32 what)
{
	return *(volatile __u64 *)&flow->tally[what];
}

static __always_inline __u64 tally(__u64 amount, __u32 place)
{
	return amount | (__u64)place << TG_PLACE_SHIFT;
}

static __always_inline __u32 place_of(__u64 tally)
{
	return tally >> TG_PLACE_SHIFT;
}

/* How many bytes a side has sent, gaps included. */
static __always_inline __u64 bytes_of(const struct tg_flow *flow, enum tg_role role)
{
	return tally_of(flow, role) & TALLY_AMOUNT;
}

/* The sequence number of a side's first byte, where they are known. */
static __always_inline __u32 first_of(const struct tg_flow *flow, enum tg_role role)
{
	return (__u32)flow->isn[role] + 1;
}

/* The first sequence number beyond the payload seen, where the side's sequence numbers are known. */
static __always_inline __u32 next_of(const struct tg_flow *flow, enum tg_role role)
{
	return first_of(flow, role) + (__u32)bytes_of(flow, role);
}

static __always_inline int known_isn(const struct tg_flow *flow, enum tg_role role)
{
	return flow->isn[role] >> 32;
}

static __always_inline void add(__s64 *to, __s64 amount)
{
	__sync_fetch_and_add(to, amount);
}

/*
 * Brings the time of an edge up to date. A clock tick at a time: the clock takes as long as a look-up, jiffies take
 * nothing.
 */
static __always_inline void touch(struct tg_edge *edge)
{
	__u64 tick = bpf_jiffies64();

	if (edge->tick == tick)
		return;
	edge->tick = tick;
	edge->last_seen = bpf_ktime_get_boot_ns();
}

static __always_inline struct tg_edge *overflow_of(enum tg_class class)
{
	__u32 index = class;

	return bpf_map_lookup_elem(&overflow, &index);
}

/* The edge in a seat, NULL where it has been forgotten. */
static __always_inline struct tg_edge *edge_at(__u64 seat)
{
	__u32 slot = seat & TG_SEAT_SLOT;
	struct tg_edge *edge = bpf_map_lookup_elem(&edges, &slot);

	if (!edge || *(volatile __u32 *)&edge->generation != seat >> TG_SEAT_GENERATION_SHIFT)
		return NULL;
	return edge;
}

/* The same, if it is the edge of this place: a class without anything else. */
static __always_inline struct tg_edge *edge_of_place(__u64 seat, __u32 place)
{
	if (((seat >> TG_SEAT_CLASS_SHIFT) & 0xff) != place)
		return NULL;
	return edge_at(seat);
}

static __always_inline __u32 take_slot(void)
{
	__u32 slot, zero = 0, *used;

	if (!bpf_map_pop_elem(&free_slots, &slot))
		return slot;
	used = bpf_map_lookup_elem(&edge_pool, &zero);
	if (!used || *used >= TG_EDGES_MAX)
		return TG_SEAT_SLOT;
	return __sync_fetch_and_add(used, 1);
}

/* Looks an edge up, or makes it; NULL where there is no slot. */
static __always_inline struct tg_edge *find_edge(const struct tg_edge_key *key, __u64 *seat)
{
	struct tg_edge *edge;
	__u64 *known, fresh;
	__u32 slot;

	known = bpf_map_lookup_elem(&edge_slots, key);
	if (known) {
		*seat = *known;
		edge = edge_at(*seat);
		if (edge)
			return edge;
	}
	slot = take_slot();
	edge = bpf_map_lookup_elem(&edges, &slot);
	if (!edge)
		return NULL;
	edge->key = *key;
	edge->tally[TG_CLIENT] = 0;
	edge->tally[TG_SERVER] = 0;
	edge->tally[TG_CONNECTION] = 0;
	edge->first_seen = bpf_ktime_get_boot_ns();
	edge->last_seen = edge->first_seen;
	edge->tick = bpf_jiffies64();
	edge->hints = 0;
	fresh = slot | (__u64)key->flow_class << TG_SEAT_CLASS_SHIFT |
		(__u64)edge->generation << TG_SEAT_GENERATION_SHIFT;
	if (!bpf_map_update_elem(&edge_slots, key, &fresh, BPF_NOEXIST)) {
		__sync_lock_test_and_set(&edge->state, TG_EDGE_LIVE);
		*seat = fresh;
		return edge;
	}
	/* Another processor was faster, or there is no memory. */
	bpf_map_push_elem(&free_slots, &slot, BPF_ANY);
	known = bpf_map_lookup_elem(&edge_slots, key);
	if (!known)
		return NULL;
	*seat = *known;
	return edge_at(*seat);
}

/* The flow's edge of a class, or NULL; the flow remembers the one that it finds. */
static __always_inline struct tg_edge *edge_of(const struct tg_flow_key *key, struct tg_flow *flow,
					       enum tg_class class)
{
	struct tg_edge_key wanted = {
		.workload = flow->workload,
		.port = flow->direction == TG_INBOUND ? local_port(key) : peer_port(key),
		.direction = flow->direction,
		.flow_class = class,
	};
	struct tg_edge *edge;
	__u64 seat = NO_SEAT;

	__builtin_memcpy(wanted.peer, key->peer, sizeof(wanted.peer));
	edge = find_edge(&wanted, &seat);
	if (edge)
		flow->seat = seat;
	return edge;
}

static __always_inline void hint_at(struct tg_edge *edge, const struct tg_flow *flow)
{
	__u8 hint = *(volatile __u8 *)&flow->hint;

	if (hint)
		__sync_fetch_and_or(&edge->hints, 1 << ((hint - 1) & 31));
}

/* Where a tally of this place is counted, NULL for nowhere; seat is where its edge may be. */
static __noinline struct tg_edge *at_place(const struct tg_flow_key *key, struct tg_flow *flow, __u32 place,
					   __u64 seat)
{
	struct tg_edge *edge = edge_of_place(seat, place);

	if (edge)
		return edge;
	if (place == TG_PLACE_NOWHERE)
		return NULL;
	if (!(place & TG_PLACE_OVERFLOW)) {
		edge = edge_of(key, flow, place);
		if (edge) {
			hint_at(edge, flow);
			return edge;
		}
		count(TG_EDGE_NOT_STORED);
	}
	return overflow_of(place & ~TG_PLACE_OVERFLOW);
}

/* Moves one tally of the flow to another place, whose edge is given; seat is where the former one may be. */
static __always_inline void move(const struct tg_flow_key *key, struct tg_flow *flow, __u32 what, __u32 place,
				 struct tg_edge *edge, __u64 seat)
{
	__u64 old, amount;
	int i;

	for (i = 0; i < TALLY_TRIES; i++) {
		old = tally_of(flow, what);
		if (place_of(old) == place)
			return;
		amount = old & TALLY_AMOUNT;
		if (__sync_val_compare_and_swap(&flow->tally[what], old, tally(amount, place)) == old)
			break;
	}
	if (i == TALLY_TRIES) {
		count(TG_RACE_LOST);
		return;
	}
	if (!amount)
		return;
	add(&edge->tally[what], amount);
	touch(edge);
	if (what == TG_CONNECTION)
		hint_at(edge, flow);
	edge = at_place(key, flow, place_of(old), seat);
	if (edge)
		add(&edge->tally[what], -amount);
}

/* Brings the flow's tallies to the edge of a class, or to the class's overflow. */
__noinline int bring_to(const struct tg_flow_key *key, struct tg_flow *flow, __u32 class)
{
	struct tg_edge *edge, *full = overflow_of(class);
	__u32 place, what;
	__u64 seat;

	if (!key || !flow)
		return 0;
	seat = flow->seat;
	edge = at_place(key, flow, class, seat);
	if (!edge || !full)
		return 0;
	place = edge == full ? class | TG_PLACE_OVERFLOW : class;
	for (what = 0; what < TG_TALLIES; what++)
		move(key, flow, what, place, edge, seat);
	return 0;
}

/* Brings the flow's tallies to where its verdict wants them. */
static __always_inline void bring(const struct tg_flow_key *key, struct tg_flow *flow)
{
	enum tg_class class;
	int i;

	for (i = 0; i < BRING_TRIES; i++) {
		class = flow_class(flow);
		bring_to(key, flow, class);
		if (flow_class(flow) == class)
			return;
	}
	count(TG_RACE_LOST);
}

/* Gives the flow another verdict, unless it is surer of the one it has, and moves all that it counted to the edge of the new class. */
__noinline int give_verdict(const struct tg_flow_key *key, struct tg_flow *flow, __u32 verdict)
{
	__u32 old;
	int i;

	if (!key || !flow)
		return 0;
	for (i = 0; i < SETTLE_TRIES; i++) {
		old = flow->verdict;
		if (old & TG_VERDICT_SETTLED || old == verdict)
			return 0;
		if (old & TG_VERDICT_DECIDED && !(verdict & (TG_VERDICT_DECIDED | TG_VERDICT_SETTLED)))
			return 0;
		if (__sync_val_compare_and_swap(&flow->verdict, old, verdict) == old)
			break;
	}
	if (i == SETTLE_TRIES) {
		count(TG_RACE_LOST);
		return 0;
	}
	if ((old ^ verdict) & TG_VERDICT_CLASS)
		bring(key, flow);
	return 0;
}

static __always_inline void settle(const struct tg_flow_key *key, struct tg_flow *flow,
				   enum tg_class class)
{
	give_verdict(key, flow, class | TG_VERDICT_SETTLED);
	bpf_map_delete_elem(&prefixes, key);
}

/*
 * Notes what the flow's first bytes look like, here and on its edge. Either the one who moves the connection sees the
 * hint, or the edge to which it was moved is the one that is seen here: both set first, and then look.
 */
static __always_inline void note_hint(const struct tg_flow_key *key, struct tg_flow *flow, enum tg_hint hint)
{
	struct tg_edge *edge;
	__u64 connection;

	*(volatile __u8 *)&flow->hint = hint;
	set_flag(flow, 0);
	connection = tally_of(flow, TG_CONNECTION);
	edge = at_place(key, flow, place_of(connection), flow->seat);
	if (edge)
		hint_at(edge, flow);
}

/*
 * Learns where a side's stream begins: from its SYN, or from the first payload that was seen of it. Of several
 * processors the first one says.
 */
static __always_inline void learn_isn(struct tg_flow *flow, enum tg_role role, const struct tg_segment *segment)
{
	if (known_isn(flow, role) || !(segment->length || segment->flags & TCP_SYN))
		return;
	__sync_val_compare_and_swap(&flow->isn[role], 0, (__u32)(segment->sequence - 1) | TG_ISN_KNOWN);
}

/* Counts payload at a place that is not the flow's seat, or brings what is counted there to where it belongs. */
static __noinline int count_slowly(const struct tg_flow_key *key, struct tg_flow *flow, enum tg_role role,
				   __u64 counted, __u32 gain)
{
	struct tg_edge *edge = at_place(key, flow, place_of(counted), flow->seat);

	if (edge) {
		add(&edge->tally[role], gain);
		touch(edge);
	}
	if (place_of(counted) != flow_class(flow))
		bring(key, flow);
	return 0;
}

/*
 * Moves the end of what was seen of one side's stream to the segment's end, and counts the bytes by which it moved;
 * returns their number. A segment without payload moves nothing: behind a FIN its sequence number is one beyond the
 * stream.
 */
static __always_inline __u32 take_in(const struct tg_flow_key *key, struct tg_flow *flow, enum tg_role role,
				     const struct tg_segment *segment)
{
	__u32 gain, first = flow->isn[role];
	struct tg_edge *edge;
	__u64 old;
	int i;

	if (!segment->length)
		return 0;
	for (i = 0; i < TALLY_TRIES; i++) {
		old = tally_of(flow, role);
		gain = segment->sequence + segment->length - first - 1 - (__u32)old;
		if (!gain || (__s32)gain < 0)
			return 0;
		if (gain > WINDOW_MAX) {
			count(TG_OUT_OF_WINDOW);
			return 0;
		}
		if (__sync_val_compare_and_swap(&flow->tally[role], old, old + gain) != old)
			continue;
		edge = edge_of_place(flow->seat, place_of(old));
		if (edge && place_of(old) == flow_class(flow)) {
			add(&edge->tally[role], gain);
			touch(edge);
		} else {
			count_slowly(key, flow, role, old, gain);
		}
		return gain;
	}
	count(TG_RACE_LOST);
	return 0;
}

#endif
