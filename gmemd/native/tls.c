#include "tls_context.h"

#include "cleanup.h"
#include "tls_peer.h"

#include <errno.h>
#include <openssl/err.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>

enum { RECORD = SSL3_RT_MAX_PLAIN_LENGTH };

/* AES-GCM may encipher some 2^24.5 full records with one key (RFC 8446, 5.5). A lane that is made anew costs less than a way to change keys
 * that a kernel which enciphers does not have. */
static const uint64_t MOST_RECORDS = 1 << 24;

struct gm_tls {
    pthread_mutex_t lock; /* of all that follows */
    SSL *ssl;
    int socket;
    struct gm_tls_peer peer;
    bool failed; /* nothing more can be said on it, because of `problem` */
    struct gm_problem problem;
    uint64_t records, most_records;
    unsigned char gathered[RECORD];
};

struct gm_tls *gm_tls_new(struct gm_tls_context *c, int socket, struct gm_problem *ret)
{
    struct gm_tls *t = calloc(1, sizeof *t);

    if (t) {
        pthread_mutex_init(&t->lock, NULL);
        t->socket = socket;
        t->most_records = MOST_RECORDS;
        t->ssl = SSL_new(c->ssl);
    }
    if (!t || !t->ssl || !SSL_set_app_data(t->ssl, &t->peer) || !SSL_set_fd(t->ssl, socket)) {
        ERR_clear_error();
        gm_blame(ret, GM_KERNEL, ENOMEM, "TLS");
        gm_tls_free(t);
        return NULL;
    }
    if (c->server)
        SSL_set_accept_state(t->ssl);
    else
        SSL_set_connect_state(t->ssl);
    return t;
}

void gm_tls_free(struct gm_tls *t)
{
    if (!t)
        return;
    SSL_free(t->ssl);
    pthread_mutex_destroy(&t->lock);
    OPENSSL_clear_free(t, sizeof *t);
}

static int fail(struct gm_tls *t, const struct gm_problem *problem)
{
    t->failed = true;
    t->problem = *problem;
    return GM_TLS_PROBLEM;
}

/* What the result of an operation means: a gm_tls_state, DONE for the end of what the peer says. */
static int state_of(struct gm_tls *t, int result, const char *doing, struct gm_problem *ret)
{
    int saved = errno, error = SSL_get_error(t->ssl, result);

    if (error == SSL_ERROR_WANT_READ)
        return GM_TLS_WANTS_READ;
    if (error == SSL_ERROR_WANT_WRITE)
        return GM_TLS_WANTS_WRITE;
    if (error == SSL_ERROR_ZERO_RETURN)
        return GM_TLS_DONE;
    if (error == SSL_ERROR_SYSCALL && !ERR_peek_error())
        gm_blame(ret, GM_LINK, saved, "TLS: %s", doing);
    else
        gm_tls_blame(ret, doing, t->peer.refused, t->peer.certificate);
    return fail(t, ret);
}

/* OpenSSL has verified already; this holds even if some option of it let somebody through. */
static bool trusted(const struct gm_tls *t)
{
    if (SSL_session_reused(t->ssl))
        return t->peer.shared != NULL;
    return SSL_get0_peer_certificate(t->ssl) && SSL_get_verify_result(t->ssl) == X509_V_OK;
}

int gm_tls_shake_hands(struct gm_tls *t, struct gm_problem *ret)
{
    GM_LOCKED(&t->lock);
    int result;

    ERR_clear_error();
    errno = 0;
    result = SSL_do_handshake(t->ssl);
    if (result != 1) {
        int state = state_of(t, result, "during the hand-shake", ret);

        if (state != GM_TLS_DONE)
            return state;
        gm_blame(ret, GM_LINK, 0, "TLS: closed during the hand-shake");
        return fail(t, ret);
    }
    if (!SSL_session_reused(t->ssl))
        t->peer.shared = NULL;
    if (!trusted(t)) {
        gm_blame(ret, GM_UNTRUSTED, 0, "TLS: it has not shown who it is");
        return fail(t, ret);
    }
    return GM_TLS_DONE;
}

int64_t gm_tls_read(struct gm_tls *t, unsigned char *to, size_t length, struct gm_problem *ret)
{
    GM_LOCKED(&t->lock);
    size_t got = 0;
    int result;

    ERR_clear_error();
    errno = 0;
    result = SSL_read_ex(t->ssl, to, length, &got);
    if (result == 1)
        return (int64_t)got;
    if (ERR_GET_REASON(ERR_peek_error()) == SSL_R_UNEXPECTED_EOF_WHILE_READING) {
        /* The protocol inside says itself what its end is: a connection that was cut is an end like any other. */
        t->failed = true;
        return 0;
    }
    return state_of(t, result, "reading", ret);
}

/* A kernel that enciphers takes plain text. */
static bool in_kernel(const struct gm_tls *t)
{
    return BIO_get_ktls_send(SSL_get_wbio(t->ssl));
}

static int64_t write_through_kernel(struct gm_tls *t, const struct iovec *v, size_t count, struct gm_problem *ret)
{
    struct msghdr message = {.msg_iov = (struct iovec *)(size_t)v, .msg_iovlen = count};
    ssize_t put = sendmsg(t->socket, &message, MSG_DONTWAIT | MSG_NOSIGNAL);

    if (put >= 0) {
        t->records += 1 + (uint64_t)put / RECORD;
        return put;
    }
    if (errno == EAGAIN || errno == EINTR)
        return GM_TLS_WANTS_WRITE;
    gm_blame(ret, GM_LINK, errno, "TLS: writing");
    return fail(t, ret);
}

/* One record from as many places as it takes; what is in one place is taken from there. */
static const void *gather(struct gm_tls *t, const struct iovec *v, size_t count, size_t *length)
{
    *length = 0;
    if (count == 1 || v->iov_len >= RECORD) {
        *length = v->iov_len < RECORD ? v->iov_len : RECORD;
        return v->iov_base;
    }
    for (size_t i = 0; i < count && *length < RECORD; i++) {
        size_t here = v[i].iov_len < RECORD - *length ? v[i].iov_len : RECORD - *length;

        memcpy(t->gathered + *length, v[i].iov_base, here);
        *length += here;
    }
    return t->gathered;
}

int64_t gm_tls_write_vector(struct gm_tls *t, const struct iovec *v, size_t count, struct gm_problem *ret)
{
    GM_LOCKED(&t->lock);
    size_t length, put = 0;
    const void *from;
    int result;

    if (t->records >= t->most_records) {
        gm_blame(ret, GM_LINK, 0, "TLS: as much was sent as one key is good for");
        return fail(t, ret);
    }
    if (in_kernel(t))
        return write_through_kernel(t, v, count, ret);
    from = gather(t, v, count, &length);
    ERR_clear_error();
    errno = 0;
    result = SSL_write_ex(t->ssl, from, length, &put);
    if (result == 1) {
        t->records++;
        return (int64_t)put;
    }
    result = state_of(t, result, "writing", ret);
    if (result != GM_TLS_DONE)
        return result;
    gm_blame(ret, GM_LINK, EPIPE, "TLS: writing");
    return fail(t, ret);
}

int64_t gm_tls_write(struct gm_tls *t, const unsigned char *from, size_t length, struct gm_problem *ret)
{
    struct iovec v = {(void *)(size_t)from, length};

    return length ? gm_tls_write_vector(t, &v, 1, ret) : 0;
}

void gm_tls_problem(struct gm_tls *t, struct gm_problem *ret)
{
    GM_LOCKED(&t->lock);

    *ret = t->problem;
}

void gm_tls_close(struct gm_tls *t)
{
    GM_LOCKED(&t->lock);

    ERR_clear_error();
    if (!t->failed && SSL_is_init_finished(t->ssl) && SSL_shutdown(t->ssl) < 0)
        ERR_clear_error(); /* the connection is as good as closed */
}

void gm_tls_describe_peer(const struct gm_tls *t, char *out)
{
    X509 *certificate = SSL_get0_peer_certificate(t->ssl);

    if (t->peer.shared)
        snprintf(out, GM_TLS_TEXT, "pre-shared key \"%s\"", t->peer.shared->name);
    else if (certificate)
        gm_certificate_describe(certificate, out, GM_TLS_TEXT);
    else
        snprintf(out, GM_TLS_TEXT, "nobody");
}

int gm_tls_peer_is(const struct gm_tls *t, const char *name)
{
    X509 *certificate = SSL_get0_peer_certificate(t->ssl);

    if (t->peer.shared)
        return !strcmp(t->peer.shared->name, name);
    return certificate && gm_certificate_names(certificate, name);
}

int gm_tls_shared(const struct gm_tls *t)
{
    return t->peer.shared != NULL;
}

int gm_tls_ktls(const struct gm_tls *t)
{
    return (in_kernel(t) ? GM_TLS_KTLS_SENDS : 0) | (BIO_get_ktls_recv(SSL_get_rbio(t->ssl)) ? GM_TLS_KTLS_RECEIVES : 0);
}

void gm_tls_set_most_records(struct gm_tls *t, uint64_t records)
{
    t->most_records = records;
}
