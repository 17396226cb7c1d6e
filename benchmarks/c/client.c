/* The limit: what a C client with librabbitmq publishes and handles, on the same queue type and with the same durability.

   The messages are those of ours, headers and all, and a publish that no queue takes would be returned; but it validates
   nothing and runs no handler: what a bus can reach is below it. Spoken to like the programs in Python
   (benchmarks/programs/job.py): ready, go, working, and a line of JSON. */

#include <amqp.h>
#include <amqp_framing.h>
#include <amqp_tcp_socket.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

enum { PREFETCH = 300, WINDOW = 1000, MARKS = 200, CHANNEL = 1, LONGEST_BODY = 1 << 20 };

static const char *const EXCHANGE = "bench", *const QUEUE = "bench", *const KEY = "order_placed.v1";

static struct {
    long expected, step, count, marks, samples;
    long mark_counts[2 * MARKS + 2];
    double mark_times[2 * MARKS + 2], mark_cpus[2 * MARKS + 2];
    long *latencies_us;
} meter;

static void fail(const char *what) {
    fprintf(stderr, "client: %s\n", what);
    exit(1);
}

static int64_t now_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

static double cpu_s(void) {
    struct rusage used;
    getrusage(RUSAGE_SELF, &used);
    return used.ru_utime.tv_sec + used.ru_stime.tv_sec + (used.ru_utime.tv_usec + used.ru_stime.tv_usec) / 1e6;
}

static void saw(int64_t sent_ns) {
    meter.count++;
    if (meter.latencies_us && sent_ns) meter.latencies_us[meter.samples++] = (now_ns() - sent_ns) / 1000;
    if (meter.count % meter.step == 0 || meter.count == meter.expected) {
        meter.mark_counts[meter.marks] = meter.count;
        meter.mark_cpus[meter.marks] = cpu_s();
        meter.mark_times[meter.marks++] = now_ns() / 1e9;
    }
}

/* getrusage says what the parent had when it forked, if that was more. */
static long max_rss_kb(void) {
    char line[256];
    long found = 0;
    FILE *status = fopen("/proc/self/status", "r");
    while (status && fgets(line, sizeof line, status))
        if (sscanf(line, "VmHWM: %ld", &found) == 1) break;
    if (status) fclose(status);
    return found;
}

static void report(void) {
    printf("{\"count\": %ld, \"max_rss_kb\": %ld, \"marks\": [", meter.count, max_rss_kb());
    for (long i = 0; i < meter.marks; i++)
        printf("%s[%ld, %.6f, %.6f]", i ? ", " : "", meter.mark_counts[i], meter.mark_times[i],
               meter.mark_cpus[i]);
    printf("], \"latencies_us\": [");
    for (long i = 0; i < meter.samples; i++) printf("%s%ld", i ? ", " : "", meter.latencies_us[i]);
    printf("]}\n");
    fflush(stdout);
}

static void wait_for_go(void) {
    char line[16];
    puts("ready");
    fflush(stdout);
    if (!fgets(line, sizeof line, stdin) || strcmp(line, "go\n")) fail("the driver has gone");
}

static void check(amqp_connection_state_t connection, const char *what) {
    if (amqp_get_rpc_reply(connection).reply_type != AMQP_RESPONSE_NORMAL) fail(what);
}

static amqp_connection_state_t open_connection(char **at) {
    amqp_connection_state_t connection = amqp_new_connection();
    amqp_socket_t *socket = amqp_tcp_socket_new(connection);
    if (!socket || amqp_socket_open(socket, at[0], atoi(at[1]))) fail("nobody listens");
    amqp_rpc_reply_t reply =
        amqp_login(connection, at[2], 0, 131072, 0, AMQP_SASL_METHOD_PLAIN, at[3], at[4]);
    if (reply.reply_type != AMQP_RESPONSE_NORMAL) fail("login refused");
    amqp_channel_open(connection, CHANNEL);
    check(connection, "no channel");
    return connection;
}

static void declare(amqp_connection_state_t connection) {
    amqp_table_entry_t quorum = {amqp_cstring_bytes("x-queue-type"),
                                 {.kind = AMQP_FIELD_KIND_UTF8, .value.bytes = amqp_cstring_bytes("quorum")}};
    amqp_table_t arguments = {1, &quorum};
    amqp_exchange_declare(connection, CHANNEL, amqp_cstring_bytes(EXCHANGE), amqp_cstring_bytes("topic"), 0, 1, 0, 0,
                          amqp_empty_table);
    check(connection, "no exchange");
    amqp_queue_declare(connection, CHANNEL, amqp_cstring_bytes(QUEUE), 0, 1, 0, 0, arguments);
    check(connection, "no queue");
    amqp_queue_bind(connection, CHANNEL, amqp_cstring_bytes(QUEUE), amqp_cstring_bytes(EXCHANGE),
                    amqp_cstring_bytes(KEY), amqp_empty_table);
    check(connection, "no binding");
}

/* ── publishing ──────────────────────────────────────────────────────────────────────────────────────────────────── */

static int body_of(char *body, long number, int64_t sent_ns, int size) {
    int length = snprintf(body, LONGEST_BODY, "{\"number\":%ld,\"sent_ns\":%" PRId64 ",\"lines\":[],\"note\":\"", number,
                          sent_ns);
    while (length < size - 2) body[length++] = 'n';
    memcpy(body + length, "\"}", 2);
    return length + 2;
}

static amqp_table_entry_t text(const char *name, const char *value) {
    return (amqp_table_entry_t){amqp_cstring_bytes(name),
                                {.kind = AMQP_FIELD_KIND_UTF8, .value.bytes = amqp_cstring_bytes(value)}};
}

static void publish_one(amqp_connection_state_t connection, long number, int64_t sent_ns, int size, int has_headers) {
    static char body[LONGEST_BODY + 2], message_id[40], id[40], at[40];
    amqp_basic_properties_t properties = {
        ._flags = AMQP_BASIC_CONTENT_TYPE_FLAG | AMQP_BASIC_DELIVERY_MODE_FLAG,
        .content_type = amqp_cstring_bytes("application/json"),
        .delivery_mode = AMQP_DELIVERY_PERSISTENT,
    };
    amqp_table_entry_t headers[5];
    if (has_headers) {
        snprintf(message_id, sizeof message_id, "%032lx", number);
        snprintf(id, sizeof id, "00000000-0000-4000-8000-%012lx", number);
        snprintf(at, sizeof at, "2026-01-01T00:00:00.%06ldZ", number % 1000000);
        headers[0] = text("cloudEvents_specversion", "1.0");
        headers[1] = text("cloudEvents_source", "/programs/client");
        headers[2] = text("cloudEvents_type", KEY);
        headers[3] = text("cloudEvents_id", id);
        headers[4] = text("cloudEvents_time", at);
        properties._flags |= AMQP_BASIC_HEADERS_FLAG | AMQP_BASIC_MESSAGE_ID_FLAG;
        properties.message_id = amqp_cstring_bytes(message_id);
        properties.headers = (amqp_table_t){5, headers};
    }
    amqp_bytes_t bytes = {body_of(body, number, sent_ns, size), body};
    if (amqp_basic_publish(connection, CHANNEL, amqp_cstring_bytes(EXCHANGE), amqp_cstring_bytes(KEY), has_headers, 0,
                           &properties, bytes))
        fail("cannot publish");
}

/* Take one frame of confirms, waiting for it at most *timeout*; 0 if there was none. */
static int take_confirms(amqp_connection_state_t connection, struct timeval *timeout) {
    amqp_frame_t frame;
    amqp_maybe_release_buffers(connection);
    int status = amqp_simple_wait_frame_noblock(connection, &frame, timeout);
    if (status == AMQP_STATUS_TIMEOUT) return 0;
    if (status != AMQP_STATUS_OK) fail(amqp_error_string2(status));
    if (frame.frame_type != AMQP_FRAME_METHOD || frame.payload.method.id != AMQP_BASIC_ACK_METHOD) fail("no confirm");
    amqp_basic_ack_t *ack = frame.payload.method.decoded;
    long confirmed = ack->multiple ? (long)ack->delivery_tag - meter.count : 1;
    while (confirmed-- > 0) saw(0);
    return 1;
}

static void publish(char **at, int window, int size, double rate, int has_headers) {
    amqp_connection_state_t connection = open_connection(at);
    struct timeval nothing = {0, 0};
    declare(connection);
    amqp_confirm_select(connection, CHANNEL);
    check(connection, "no confirms");
    wait_for_go();
    int64_t began = now_ns();
    for (long sent = 0; meter.count < meter.expected;) {
        int64_t due = rate > 0 ? began + (int64_t)(sent / rate * 1e9) : 0;
        int is_due = due <= now_ns();
        if (sent < meter.expected && sent - meter.count < window && is_due) {
            publish_one(connection, sent++, now_ns(), size, has_headers);
            /* Now and then only: each look is a system call. */
            if (rate > 0 || sent % 50 == 0)
                while (take_confirms(connection, &nothing)) {
                }
        } else if (!is_due && sent < meter.expected) {
            int64_t left_us = (due - now_ns()) / 1000;
            struct timeval until_due = {0, left_us > 0 ? left_us : 0};
            take_confirms(connection, &until_due);
        } else {
            take_confirms(connection, NULL);
        }
    }
    report();
}

/* ── handling ────────────────────────────────────────────────────────────────────────────────────────────────────── */

static int64_t sent_ns_of(amqp_bytes_t body) {
    static const char field[] = "\"sent_ns\":";
    char *found = memmem(body.bytes, body.len, field, sizeof field - 1);
    return found ? strtoll(found + sizeof field - 1, NULL, 10) : 0;
}

static void handle(char **at, int ack_every) {
    amqp_connection_state_t connection = open_connection(at);
    declare(connection);
    amqp_basic_qos(connection, CHANNEL, 0, PREFETCH, 0);
    check(connection, "no prefetch");
    wait_for_go();
    amqp_basic_consume(connection, CHANNEL, amqp_cstring_bytes(QUEUE), amqp_empty_bytes, 0, 0, 0, amqp_empty_table);
    check(connection, "cannot consume");
    puts("working");
    fflush(stdout);
    while (meter.count < meter.expected) {
        amqp_envelope_t envelope;
        amqp_maybe_release_buffers(connection);
        if (amqp_consume_message(connection, &envelope, NULL, 0).reply_type != AMQP_RESPONSE_NORMAL) fail("no delivery");
        int64_t sent_ns = sent_ns_of(envelope.message.body);
        int is_last = meter.count + 1 == meter.expected;
        if (((meter.count + 1) % ack_every == 0 || is_last) &&
            amqp_basic_ack(connection, CHANNEL, envelope.delivery_tag, ack_every > 1))
            fail("cannot ack");
        saw(sent_ns);
        amqp_destroy_envelope(&envelope);
    }
    report();
}

int main(int count, char **arguments) {
    if (count != 13)
        fail("usage: client HOST PORT VHOST USER PASSWORD publish|handle EVENTS BYTES WINDOW|ACK_EVERY RATE LATENCY HEADERS");
    long events = atol(arguments[7]);
    int size = atoi(arguments[8]), many = atoi(arguments[9]);
    meter.expected = events;
    meter.step = events > MARKS ? events / MARKS : 1;
    if (atoi(arguments[11])) meter.latencies_us = calloc(events, sizeof *meter.latencies_us);
    if (strcmp(arguments[6], "publish") == 0)
        publish(arguments + 1, many, size, atof(arguments[10]), atoi(arguments[12]));
    else
        handle(arguments + 1, many);
    return 0;
}
