/* SPDX-License-Identifier: (BSD-2-Clause OR GPL-2.0) */
/* The maps. All but the scratch are pinned by the agent and outlive it. */
#ifndef TIDEGATE_MAPS_H
#define TIDEGATE_MAPS_H

#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>

#include "structs.h"

/* Whose an interface is. A hash replaces a value as a whole: readers never see half of one. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, TG_ATTACHMENTS_MAX);
	__type(key, struct tg_interface);
	__type(value, struct tg_attachment);
} attachments SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, TG_PROFILES_MAX);
	__type(key, __u32);
	__type(value, struct tg_profile);
} profiles SEC(".maps");

/* By flow_hash of the flow's key. Of two that share one, the second is not stored. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, TG_FLOWS_MAX);
	__type(key, __u64);
	__type(value, struct tg_flow);
} flows SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct tg_flow_seed);
} flow_seed SEC(".maps");

/* Streams that are not decided yet and did not fit in one segment. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, TG_PREFIXES_MAX);
	__type(key, struct tg_flow_key);
	__type(value, struct tg_prefix);
} prefixes SEC(".maps");

/* ClientHellos, for a reader that asks for them; see report.h. */
struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, TG_HELLOS_BYTES);
} hellos SEC(".maps");

/* What is reported: user space reads it without a system call. Which slots are in use, edge_slots says. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, TG_EDGES_MAX);
	__type(key, __u32);
	__type(value, struct tg_edge);
} edges SEC(".maps");

/* From an edge's key to its enum tg_seat. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, TG_EDGES_MAX);
	__type(key, struct tg_edge_key);
	__type(value, __u64);
} edge_slots SEC(".maps");

/* How many slots were ever taken: those from there on are free. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u32);
} edge_pool SEC(".maps");

/* Slots that user space gave back. The last one comes first, so that those in use stay close together. */
struct {
	__uint(type, BPF_MAP_TYPE_STACK);
	__uint(max_entries, TG_EDGES_MAX);
	__uint(key_size, 0);
	__type(value, __u32);
} free_slots SEC(".maps");

/* Connections and bytes of edges for which there was no slot, by class. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, TG_CLASSES);
	__type(key, __u32);
	__type(value, struct tg_edge);
} overflow SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, TG_COUNTERS);
	__type(key, __u32);
	__type(value, __u64);
} counters SEC(".maps");

/* TC programs run with bottom halves off, so one scratch per processor is enough. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct tg_scratch);
} scratch SEC(".maps");

static __always_inline void count(enum tg_counter counter)
{
	__u32 index = counter;
	__u64 *value = bpf_map_lookup_elem(&counters, &index);

	if (value)
		(*value)++;
}

#endif
