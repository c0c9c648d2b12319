/*
 * Tells each TCP connect and accept, its first payload byte and its end.
 *
 * Only raw tracepoints: they need neither kprobes nor tracefs, and go with the process that attached them. The layout of
 * kernel structures comes as constants (SOCK_FAMILY and so on) from the type information of the kernel that runs, so
 * that the headers this is compiled with may be those of another kernel.
 */
#include <linux/errno.h>
#include <net/tcp_states.h>

#define IPV4 2			/* AF_INET, AF_INET6: linux/socket.h */
#define IPV6 10
#define TCP 6			/* IPPROTO_TCP */
#define TCP_FLAGS 13		/* offset in the TCP header, RFC 9293 3.1 */
#define FLAG_SYN 0x02
#define FLAG_ACK 0x10
#define OPEN_SOCKETS 65536
#define CALLS 16384
#define RING_PAGES 256

enum kind {
	CONNECTING = 1,		/* a SYN is about to be sent */
	NOT_SENT,		/* connect(2) failed before there was one */
	ESTABLISHED,		/* of what was connecting */
	LANDED,			/* a handshake was completed here, and nobody has accepted it yet */
	ACCEPTED,
	FIRST_BYTE,		/* arrived */
	FIRST_READ,		/* of a first byte whose arrival was not seen */
	CLOSED,			/* before any payload byte was received */
	REFUSED_HERE,		/* this machine answered a SYN with RST; local is where it had arrived */
};

enum loss {
	RING_FULL,
	SOCKETS_FULL,
	LOSSES,
};

struct event {
	u64 at;			/* CLOCK_MONOTONIC, ns */
	u64 socket;
	u64 cgroup;
	u32 kind;
	u32 pid;
	u32 uid;
	u32 netns;
	u32 error;
	u16 local_port;
	u16 peer_port;
	u16 dialled_port;	/* 0: not known */
	u16 listener_port;	/* 0: not known */
	u8 local[16];		/* IPv4 as IPv4-mapped */
	u8 peer[16];
	u8 dialled[16];
	char comm[16];
};

struct open_socket {
	u8 passive;
	u8 accepted;
	u8 has_payload;
};

struct call {
	u16 port;
	u16 syn_sent;
	u8 address[16];
};

BPF_RINGBUF_OUTPUT(events, RING_PAGES);
BPF_ARRAY(losses, u64, LOSSES);
BPF_HASH(sockets, u64, struct open_socket, OPEN_SOCKETS);
BPF_TABLE("lru_hash", u64, struct call, calls, CALLS);
#ifdef CHOSEN
BPF_HASH(chosen, u32, u8, CHOSEN);
#endif

static inline void lose(u32 why)
{
	u64 *count = losses.lookup(&why);

	if (count)
		__sync_fetch_and_add(count, 1);
}

static inline u64 word(u64 address)
{
	u64 value = 0;

	bpf_probe_read_kernel(&value, sizeof(value), (void *)address);
	return value;
}

static inline u32 half_word(u64 address)
{
	u32 value = 0;

	bpf_probe_read_kernel(&value, sizeof(value), (void *)address);
	return value;
}

static inline u16 short_word(u64 address)
{
	u16 value = 0;

	bpf_probe_read_kernel(&value, sizeof(value), (void *)address);
	return value;
}

static inline void map_ipv4(u8 *address)
{
	address[10] = 0xff;
	address[11] = 0xff;
}

static inline bool is_chosen(u32 netns)
{
#ifdef CHOSEN
	return chosen.lookup(&netns) != NULL;
#else
	return true;
#endif
}

static inline u32 netns_of(u64 socket)
{
	return half_word(word(socket + SOCK_NET) + NET_NUMBER);
}

static inline bool is_tcp(u64 socket)
{
	u16 family = short_word(socket + SOCK_FAMILY);

	return short_word(socket + SOCK_PROTOCOL) == TCP && (family == IPV4 || family == IPV6);
}

/* What a socket is connected to. The port of a bound socket outlives its binding here, unlike skc_num. */
static inline void put_ends(struct event *event, u64 socket)
{
	event->socket = socket;
	event->netns = netns_of(socket);
	event->local_port = bpf_ntohs(short_word(socket + SOCK_LOCAL_PORT));
	event->peer_port = bpf_ntohs(short_word(socket + SOCK_PEER_PORT));
	if (short_word(socket + SOCK_FAMILY) == IPV4) {
		map_ipv4(event->local);
		map_ipv4(event->peer);
		bpf_probe_read_kernel(event->local + 12, 4, (void *)(socket + SOCK_LOCAL_IPV4));
		bpf_probe_read_kernel(event->peer + 12, 4, (void *)(socket + SOCK_PEER_IPV4));
	} else {
		bpf_probe_read_kernel(event->local, 16, (void *)(socket + SOCK_LOCAL_IPV6));
		bpf_probe_read_kernel(event->peer, 16, (void *)(socket + SOCK_PEER_IPV6));
	}
}

/* Threads have names of their own: the process is called as its first one. */
static inline void put_process(struct event *event)
{
	u64 leader = word(bpf_get_current_task() + TASK_LEADER);

	event->pid = bpf_get_current_pid_tgid() >> 32;
	event->uid = (u32)bpf_get_current_uid_gid();
	event->cgroup = bpf_get_current_cgroup_id();
	bpf_probe_read_kernel(event->comm, sizeof(event->comm), (void *)(leader + TASK_NAME));
}

static inline void put_dialled(struct event *event, struct call *call)
{
	event->dialled_port = call->port;
	__builtin_memcpy(event->dialled, call->address, sizeof(event->dialled));
}

static inline void tell(struct event *event, u32 kind)
{
	event->kind = kind;
	event->at = bpf_ktime_get_ns();
	if (events.ringbuf_output(event, sizeof(*event), 0))
		lose(RING_FULL);
}

static inline void remember(u64 socket, struct open_socket *open)
{
	if (sockets.update(&socket, open))
		lose(SOCKETS_FULL);
}

/* connect(2) and its like: in the context of the process that calls it (tcp_v4_connect, tcp_v6_connect). */
static inline void connecting(u64 socket)
{
	struct event event = {};
	struct open_socket open = {};
	u64 thread = bpf_get_current_pid_tgid();
	struct call *call = calls.lookup(&thread);

	put_ends(&event, socket);
	if (call) {
		put_dialled(&event, call);
		call->syn_sent = 1;
	}
	if (!is_chosen(event.netns))
		return;
	put_process(&event);
	remember(socket, &open);
	tell(&event, CONNECTING);
}

static inline void established(u64 socket)
{
	struct event event = {};
	struct open_socket *open = sockets.lookup(&socket);
	struct open_socket passive = {.passive = 1};

	put_ends(&event, socket);
	if (open) {
		tell(&event, ESTABLISHED);
	} else if (is_chosen(event.netns)) {
		remember(socket, &passive);
		tell(&event, LANDED);
	}
}

/* trace_inet_sock_set_state(const struct sock *sk, const int oldstate, const int newstate) */
int on_state(struct bpf_raw_tracepoint_args *ctx)
{
	u64 socket = ctx->args[0];
	u32 before = ctx->args[1], after = ctx->args[2];
	struct event event = {};

	if (!is_tcp(socket))
		return 0;
	if (after == TCP_SYN_SENT) {
		connecting(socket);
	} else if (after == TCP_ESTABLISHED && (before == TCP_SYN_SENT || before == TCP_SYN_RECV)) {
		established(socket);
	} else if (after == TCP_CLOSE && sockets.lookup(&socket)) {
		sockets.delete(&socket);
		put_ends(&event, socket);
		event.error = half_word(socket + SOCK_ERROR);
		tell(&event, CLOSED);
	}
	return 0;
}

static inline void first_byte(u64 socket, struct open_socket *open, u32 kind)
{
	struct event event = {};

	if (open->has_payload)
		return;
	put_ends(&event, socket);
	/* What has its payload and its process is told in full. */
	if (!open->passive || open->accepted)
		sockets.delete(&socket);
	else
		open->has_payload = 1;
	tell(&event, kind);
}

/* trace_tcp_probe(struct sock *sk, const struct sk_buff *skb): each segment that arrives at an open connection. */
int on_segment(struct bpf_raw_tracepoint_args *ctx)
{
	u64 socket = ctx->args[0], packet = ctx->args[1];
	struct open_socket *open = sockets.lookup(&socket);
	u8 offset = 0;

	if (!open)
		return 0;
	/* The packet begins with its TCP header here; the upper half of byte 12 is its length in words. */
	bpf_probe_read_kernel(&offset, 1, (void *)(word(packet + PACKET_DATA) + 12));
	if (half_word(packet + PACKET_LENGTH) > (offset >> 4) * 4)
		first_byte(socket, open, FIRST_BYTE);
	return 0;
}

static inline void accepted(u64 socket, u16 listener_port)
{
	struct event event = {.listener_port = listener_port};
	struct open_socket *open = sockets.lookup(&socket);
	struct open_socket fresh = {.passive = 1, .accepted = 1};

	put_ends(&event, socket);
	if (!is_chosen(event.netns))
		return;
	if (!open)
		remember(socket, &fresh);
	else if (open->has_payload)
		sockets.delete(&socket);
	else
		open->accepted = 1;
	put_process(&event);
	tell(&event, ACCEPTED);
}

/* trace_tcp_rcv_space_adjust(struct sock *sk): payload was handed to a process. */
int on_read(struct bpf_raw_tracepoint_args *ctx)
{
	u64 socket = ctx->args[0];
	struct open_socket *open = sockets.lookup(&socket);

	if (!open)
		return 0;
	/* A first byte that came with the handshake passes no trace_tcp_probe. */
	first_byte(socket, open, FIRST_READ);
	/* What was accepted otherwise than by accept(2), such as io_uring, is known by who reads. */
	open = sockets.lookup(&socket);
	if (open && open->passive && !open->accepted)
		accepted(socket, 0);
	return 0;
}

/* The socket behind a file descriptor of the current process, 0 when it has none. */
static inline u64 socket_at(u32 descriptor)
{
	u64 table = word(word(bpf_get_current_task() + TASK_FILES) + FILES_TABLE);

	if (descriptor >= half_word(table + TABLE_SIZE))
		return 0;
	return word(word(word(word(table + TABLE_FILES) + descriptor * 8) + FILE_DATA) + SOCKET_SOCK);
}

/* trace_sys_enter(struct pt_regs *regs, long id) */
int on_call(struct bpf_raw_tracepoint_args *ctx)
{
	u64 thread = bpf_get_current_pid_tgid();
	struct call call = {};
	struct {
		u16 family;
		u16 port;
		u8 rest[24];
	} name = {};		/* struct sockaddr_in, struct sockaddr_in6 */

	if (ctx->args[1] != CALL_CONNECT)
		return 0;
	void *given = (void *)word(ctx->args[0] + REGISTERS_SECOND);
	if (bpf_probe_read_user(&name, 16, given))
		return 0;
	if (name.family == IPV4) {
		map_ipv4(call.address);
		__builtin_memcpy(call.address + 12, name.rest, 4);
	} else if (name.family == IPV6) {
		/* Behind port and flow label. */
		bpf_probe_read_user(call.address, 16, given + 8);
	} else {
		return 0;
	}
	call.port = bpf_ntohs(name.port);
	calls.update(&thread, &call);
	return 0;
}

static inline void connect_returned(u32 descriptor, s64 result)
{
	u64 thread = bpf_get_current_pid_tgid();
	struct call *call = calls.lookup(&thread);
	struct event event = {};
	u64 socket;

	if (!call)
		return;
	put_dialled(&event, call);
	bool failed = !call->syn_sent && result < 0;
	calls.delete(&thread);
	if (!failed || result == -EINPROGRESS || result == -EALREADY || result == -EISCONN)
		return;
	if (result == -ENOTSOCK)
		return;
	socket = socket_at(descriptor);
	if (!socket || !is_tcp(socket))
		return;
	put_ends(&event, socket);
	if (!is_chosen(event.netns))
		return;
	event.error = -result;
	put_process(&event);
	tell(&event, NOT_SENT);
}

static inline void accept_returned(u32 listener, s64 result)
{
	u64 socket;

	if (result < 0)
		return;
	socket = socket_at(result);
	if (!socket || !is_tcp(socket))
		return;
	u64 listening = socket_at(listener);
	accepted(socket, listening && is_tcp(listening) ? short_word(listening + SOCK_NUMBER) : 0);
}

/* trace_sys_exit(struct pt_regs *regs, long ret): also of calls that were waiting when tracing began. */
int on_return(struct bpf_raw_tracepoint_args *ctx)
{
	u64 registers = ctx->args[0];
	u32 number = half_word(registers + REGISTERS_CALL);

	if (number == CALL_CONNECT)
		connect_returned(half_word(registers + REGISTERS_FIRST), ctx->args[1]);
	else if (number == CALL_ACCEPT || number == CALL_ACCEPT4)
		accept_returned(half_word(registers + REGISTERS_FIRST), ctx->args[1]);
	return 0;
}

/* trace_tcp_send_reset(const struct sock *sk, const struct sk_buff *skb, ...) */
int on_reset(struct bpf_raw_tracepoint_args *ctx)
{
	u64 packet = ctx->args[1];
	u64 head = word(packet + PACKET_HEAD);
	u64 network = head + short_word(packet + PACKET_NETWORK);
	u64 transport = head + short_word(packet + PACKET_TRANSPORT);
	struct event event = {};
	u8 version = 0, flags = 0;

	if (!packet)
		return 0;
	bpf_probe_read_kernel(&flags, 1, (void *)(transport + TCP_FLAGS));
	if ((flags & (FLAG_SYN | FLAG_ACK)) != FLAG_SYN)
		return 0;
	event.netns = half_word(word(word(packet + PACKET_DEVICE) + DEVICE_NET) + NET_NUMBER);
	if (!is_chosen(event.netns))
		return 0;
	bpf_probe_read_kernel(&version, 1, (void *)network);
	if (version >> 4 == 4) {
		map_ipv4(event.local);
		map_ipv4(event.peer);
		bpf_probe_read_kernel(event.peer + 12, 4, (void *)(network + 12));
		bpf_probe_read_kernel(event.local + 12, 4, (void *)(network + 16));
	} else {
		bpf_probe_read_kernel(event.peer, 16, (void *)(network + 8));
		bpf_probe_read_kernel(event.local, 16, (void *)(network + 24));
	}
	event.peer_port = bpf_ntohs(short_word(transport));
	event.local_port = bpf_ntohs(short_word(transport + 2));
	tell(&event, REFUSED_HERE);
	return 0;
}
