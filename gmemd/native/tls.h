/*
 * TLS 1.3 on a connection: both ends show a certificate, or both have the same key.
 *
 * OpenSSL wants one thread at a time in a session. A lane is read by one thread while another sends signs of life on it, so each
 * session has a lock, which nobody holds while waiting for anything. OpenSSL reads ahead, some records at a time, and what it holds
 * shows on no socket: gm_tls_read() is to be called until it wants more before the socket is waited for.
 */
#ifndef GM_TLS_H
#define GM_TLS_H

#include "problem.h"

#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>
#include <sys/uio.h>

/* python */
#define GM_TLS_TEXT 512     /* holds the description of a peer */
#define GM_TLS_NAME 255     /* of a pre-shared key; as long as a DNS name */
#define GM_TLS_MIN_KEY 16   /* bytes of one: fewer can be tried out */
#define GM_TLS_MAX_KEY 64

enum gm_tls_state {
    GM_TLS_DONE = 0,
    GM_TLS_PROBLEM = -1,
    GM_TLS_WANTS_READ = -2,  /* go on when the socket is readable */
    GM_TLS_WANTS_WRITE = -3, /* go on when it is writable */
};

enum gm_tls_ktls {
    GM_TLS_KTLS_SENDS = 1,    /* it enciphers what we send */
    GM_TLS_KTLS_RECEIVES = 2, /* it deciphers what comes */
};

struct gm_tls_context; /* who we are, and whom we trust */
struct gm_tls;         /* one connection */

/* The server's end or the client's. Without a certificate or a key, nobody is let in. `ktls`: the kernel may encipher and decipher, in
 * the directions that it and OpenSSL can. */
struct gm_tls_context *gm_tls_context_new(int server, int ktls, struct gm_problem *ret);
void gm_tls_context_free(struct gm_tls_context *c);
/* PEM: our certificate, with those between it and the root. */
int gm_tls_context_certify(struct gm_tls_context *c, const char *certificate, struct gm_problem *ret);
/* PEM: the key of the certificate, which comes first. */
int gm_tls_context_give_key(struct gm_tls_context *c, const char *key, struct gm_problem *ret);
/* PEM: the certificates that the peer's must come from. */
int gm_tls_context_trust(struct gm_tls_context *c, const char *ca, struct gm_problem *ret);
/* PEM: lists of revoked certificates. From now on there has to be one of every authority in a peer's chain. */
int gm_tls_context_revoke(struct gm_tls_context *c, const char *crl, struct gm_problem *ret);
/* One more key that a peer may share with us. A client has one. */
int gm_tls_context_share(struct gm_tls_context *c, const char *name, const unsigned char *key, uint32_t length,
                         struct gm_problem *ret);
/* Our own certificate, into `out` of GM_TLS_TEXT bytes; returns the seconds that it is still valid. */
int64_t gm_tls_context_describe(const struct gm_tls_context *c, char *out);
/* The same of the list of revoked certificates that ends first. */
int64_t gm_tls_context_describe_list(const struct gm_tls_context *c, char *out);

/* `socket` stays the caller's, and is non-blocking. The context may go before the session. */
struct gm_tls *gm_tls_new(struct gm_tls_context *c, int socket, struct gm_problem *ret);
void gm_tls_free(struct gm_tls *t);
/* A gm_tls_state. Done, the peer has proved to be one that we trust: what its name is, and may, is the caller's to ask. */
int gm_tls_shake_hands(struct gm_tls *t, struct gm_problem *ret);
/* Bytes read, 0 at the end, or a gm_tls_state. */
int64_t gm_tls_read(struct gm_tls *t, unsigned char *to, size_t length, struct gm_problem *ret);
/* Bytes written, or a gm_tls_state. When it wants something, the same bytes must come first the next time. */
int64_t gm_tls_write(struct gm_tls *t, const unsigned char *from, size_t length, struct gm_problem *ret);
/* Says that nothing more will be written. */
void gm_tls_close(struct gm_tls *t);
/* Who the peer is, for people, into `out` of GM_TLS_TEXT bytes. */
void gm_tls_describe_peer(const struct gm_tls *t, char *out);
/* Whether that is the peer's name: in its certificate a DNS name, address or URI; or the pre-shared key's. A name that begins with a
 * dot stands for all DNS names that end with it. */
int gm_tls_peer_is(const struct gm_tls *t, const char *name);
/* Whether it came with a pre-shared key. */
int gm_tls_shared(const struct gm_tls *t);
/* What the kernel does of it: bits of gm_tls_ktls. */
int gm_tls_ktls(const struct gm_tls *t);
/* After so many records the connection has to be made anew; for tests. */
void gm_tls_set_most_records(struct gm_tls *t, uint64_t records);
/* end python */

/* As gm_tls_write(), from several places. */
int64_t gm_tls_write_vector(struct gm_tls *t, const struct iovec *v, size_t count, struct gm_problem *ret);

/* The latest problem. */
void gm_tls_problem(struct gm_tls *t, struct gm_problem *ret);

#endif
