/*
 * Who we are and whom we trust.
 *
 * A certificate's key and the pre-shared keys come as text that Python has read from files which are the daemon's alone. Pre-shared
 * keys are those of TLS 1.3 (RFC 8446, 4.2.11) with a Diffie-Hellman exchange, so a key that leaks later opens nothing that was recorded.
 * Sessions are never resumed and nothing is sent before the hand-shake ends: what was recorded cannot be replayed.
 */
#include "tls_context.h"

#include "tls_peer.h"

#include <errno.h>
#include <openssl/crypto.h>
#include <openssl/err.h>
#include <openssl/pem.h>
#include <openssl/x509_vfy.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum {
    MOST_CERTIFICATES = 32 * 1024, /* bytes that a peer may show before it is known: five are a few thousand */
    LONGEST_CHAIN = 5,
};

/* A pre-shared key goes with one hash, and the first suite with it: SHA-256. */
static const char SUITES[] = "TLS_AES_128_GCM_SHA256:TLS_CHACHA20_POLY1305_SHA256:TLS_AES_256_GCM_SHA384";
static const unsigned char AES_128_GCM_SHA256[] = {0x13, 0x01};

/* A pre-shared key is a session to OpenSSL, which wants to know whose. */
static const unsigned char OURS[] = "gmemd";

#define AUTO(type, release)                                                                    \
    static inline void release##_auto(type **pointer)                                           \
    {                                                                                           \
        release(*pointer);                                                                      \
    }
AUTO(BIO, BIO_free_all)
AUTO(X509, X509_free)
AUTO(EVP_PKEY, EVP_PKEY_free)
#define auto_of(release) __attribute__((cleanup(release##_auto)))

static int keys_index;
static pthread_once_t once = PTHREAD_ONCE_INIT;

static void free_keys(void *parent, void *keys, CRYPTO_EX_DATA *data, int index, long argl, void *argp)
{
    struct gm_shared_key *next, *key = keys;

    (void)parent, (void)data, (void)index, (void)argl, (void)argp;
    for (; key; key = next) {
        next = key->next;
        OPENSSL_clear_free(key, sizeof *key);
    }
}

static void register_keys(void)
{
    keys_index = SSL_CTX_get_ex_new_index(0, NULL, NULL, NULL, free_keys);
}

static struct gm_shared_key *keys_of(const SSL_CTX *ssl)
{
    return SSL_CTX_get_ex_data(ssl, keys_index);
}

/* Notes what is wrong with the peer's certificate. What OpenSSL found stands. */
static int verified(int ok, X509_STORE_CTX *store)
{
    SSL *ssl = X509_STORE_CTX_get_ex_data(store, SSL_get_ex_data_X509_STORE_CTX_idx());
    struct gm_tls_peer *peer = SSL_get_app_data(ssl);
    X509 *leaf = X509_STORE_CTX_get0_cert(store);
    int error = X509_STORE_CTX_get_error(store), depth = X509_STORE_CTX_get_error_depth(store);
    const char *trouble = gm_list_trouble(error), *why = trouble ? trouble : X509_verify_cert_error_string(error);

    if (ok || peer->refused[0])
        return ok;
    if (trouble) /* or the peer would hear that its certificate has expired, or its authority is unknown */
        X509_STORE_CTX_set_error(store, X509_V_ERR_CRL_PATH_VALIDATION_ERROR);
    if (depth)
        snprintf(peer->refused, sizeof peer->refused, "%s (%d above it)", why, depth);
    else
        snprintf(peer->refused, sizeof peer->refused, "%s", why);
    if (leaf)
        gm_certificate_describe(leaf, peer->certificate, sizeof peer->certificate);
    return 0;
}

static SSL_SESSION *session_of(SSL *ssl, const struct gm_shared_key *key)
{
    SSL_SESSION *session = SSL_SESSION_new();
    const SSL_CIPHER *cipher = SSL_CIPHER_find(ssl, AES_128_GCM_SHA256);

    if (session && cipher && SSL_SESSION_set1_master_key(session, key->key, key->length) &&
        SSL_SESSION_set1_id_context(session, OURS, sizeof OURS) && SSL_SESSION_set_cipher(session, cipher) &&
        SSL_SESSION_set_protocol_version(session, TLS1_3_VERSION))
        return session;
    SSL_SESSION_free(session);
    return NULL;
}

/* The server's: the peer names a key. An unknown name goes on without one, and fails for want of a certificate. */
static int find_key(SSL *ssl, const unsigned char *name, size_t length, SSL_SESSION **session)
{
    struct gm_tls_peer *peer = SSL_get_app_data(ssl);
    const struct gm_shared_key *key = keys_of(SSL_get_SSL_CTX(ssl));

    *session = NULL;
    while (key && (strlen(key->name) != length || memcmp(key->name, name, length)))
        key = key->next;
    peer->shared = key;
    if (!key)
        return 1;
    *session = session_of(ssl, key);
    return *session != NULL;
}

/* The client's: it has one. */
static int use_key(SSL *ssl, const EVP_MD *md, const unsigned char **name, size_t *length, SSL_SESSION **session)
{
    struct gm_tls_peer *peer = SSL_get_app_data(ssl);
    const struct gm_shared_key *key = keys_of(SSL_get_SSL_CTX(ssl));

    *session = NULL;
    if (!key || (md && EVP_MD_get_type(md) != NID_sha256))
        return 1;
    *session = session_of(ssl, key);
    *name = (const unsigned char *)key->name;
    *length = strlen(key->name);
    peer->shared = key;
    return *session != NULL;
}

static int blame(struct gm_problem *ret, const char *what)
{
    unsigned long error = ERR_peek_error();
    const char *why = ERR_reason_error_string(error);

    ERR_clear_error();
    return gm_blame(ret, GM_KERNEL, 0, "%s%s%s", what, why ? ": " : "", why ? why : "");
}

static bool set_up(SSL_CTX *ssl, bool ktls)
{
    SSL_CTX_set_options(ssl, SSL_OP_NO_TICKET | SSL_OP_NO_COMPRESSION | SSL_OP_NO_RENEGOTIATION |
                                 SSL_OP_CIPHER_SERVER_PREFERENCE | (ktls ? SSL_OP_ENABLE_KTLS : 0));
    /* One recv() a record in place of two. What OpenSSL then holds shows on no socket: every reader reads until there is nothing. */
    SSL_CTX_set_read_ahead(ssl, 1);
    SSL_CTX_set_session_cache_mode(ssl, SSL_SESS_CACHE_OFF);
    SSL_CTX_set_mode(ssl, SSL_MODE_ENABLE_PARTIAL_WRITE | SSL_MODE_ACCEPT_MOVING_WRITE_BUFFER | SSL_MODE_NO_AUTO_CHAIN);
    SSL_CTX_set_verify(ssl, SSL_VERIFY_PEER | SSL_VERIFY_FAIL_IF_NO_PEER_CERT, verified);
    SSL_CTX_set_verify_depth(ssl, LONGEST_CHAIN);
    SSL_CTX_set_max_cert_list(ssl, MOST_CERTIFICATES);
    SSL_CTX_set_psk_find_session_callback(ssl, find_key);
    SSL_CTX_set_psk_use_session_callback(ssl, use_key);
    return SSL_CTX_set_session_id_context(ssl, OURS, sizeof OURS) && SSL_CTX_set_num_tickets(ssl, 0) && SSL_CTX_set_min_proto_version(ssl, TLS1_3_VERSION) &&
           SSL_CTX_set_max_proto_version(ssl, TLS1_3_VERSION) && SSL_CTX_set_ciphersuites(ssl, SUITES);
}

struct gm_tls_context *gm_tls_context_new(int server, int ktls, struct gm_problem *ret)
{
    struct gm_tls_context *c = calloc(1, sizeof *c);

    pthread_once(&once, register_keys);
    if (c) {
        c->server = server;
        c->ssl = SSL_CTX_new(server ? TLS_server_method() : TLS_client_method());
    }
    if (!c || !c->ssl || !set_up(c->ssl, ktls)) {
        blame(ret, "TLS cannot be set up");
        gm_tls_context_free(c);
        return NULL;
    }
    return c;
}

void gm_tls_context_free(struct gm_tls_context *c)
{
    if (c) {
        X509_CRL_free(c->list);
        SSL_CTX_free(c->ssl);
    }
    free(c);
}

int gm_tls_no_password(char *to, int room, int writing, void *data)
{
    (void)to, (void)room, (void)writing, (void)data;
    return -1;
}

bool gm_pem_ended(void)
{
    if (ERR_GET_REASON(ERR_peek_last_error()) != PEM_R_NO_START_LINE)
        return false;
    ERR_clear_error();
    return true;
}

static X509 *next_certificate(BIO *from)
{
    return PEM_read_bio_X509(from, NULL, gm_tls_no_password, NULL);
}

static bool add_chain(SSL_CTX *ssl, BIO *from)
{
    X509 *certificate;

    while ((certificate = next_certificate(from)))
        if (!SSL_CTX_add0_chain_cert(ssl, certificate)) {
            X509_free(certificate);
            return false;
        }
    return gm_pem_ended();
}

static int add_roots(SSL_CTX *ssl, const char *pem)
{
    auto_of(BIO_free_all) BIO *from = BIO_new_mem_buf(pem, -1);
    X509_STORE *store = SSL_CTX_get_cert_store(ssl);
    int count = 0;

    for (;; count++) {
        auto_of(X509_free) X509 *root = from ? next_certificate(from) : NULL;

        if (!root)
            break;
        if (!X509_STORE_add_cert(store, root) || !SSL_CTX_add_client_CA(ssl, root))
            return -1;
    }
    return gm_pem_ended() ? count : -1;
}

int gm_tls_context_certify(struct gm_tls_context *c, const char *certificate, struct gm_problem *ret)
{
    auto_of(BIO_free_all) BIO *from = BIO_new_mem_buf(certificate, -1);
    auto_of(X509_free) X509 *own = from ? next_certificate(from) : NULL;

    if (!own || SSL_CTX_use_certificate(c->ssl, own) != 1)
        return blame(ret, "not a certificate in PEM");
    return add_chain(c->ssl, from) ? 0 : blame(ret, "a certificate of the chain that is not whole");
}

int gm_tls_context_give_key(struct gm_tls_context *c, const char *key, struct gm_problem *ret)
{
    auto_of(BIO_free_all) BIO *from = BIO_new_mem_buf(key, -1);
    auto_of(EVP_PKEY_free) EVP_PKEY *own = from ? PEM_read_bio_PrivateKey(from, NULL, gm_tls_no_password, NULL) : NULL;

    if (!own)
        return blame(ret, "not a key in PEM, without a password");
    if (SSL_CTX_use_PrivateKey(c->ssl, own) != 1 || SSL_CTX_check_private_key(c->ssl) != 1)
        return blame(ret, "not the key of the certificate");
    return 0;
}

int gm_tls_context_trust(struct gm_tls_context *c, const char *ca, struct gm_problem *ret)
{
    int count = add_roots(c->ssl, ca);

    if (count <= 0)
        return blame(ret, count ? "a certificate that is not whole" : "no certificates in PEM");
    return 0;
}

int gm_tls_context_share(struct gm_tls_context *c, const char *name, const unsigned char *key, uint32_t length,
                         struct gm_problem *ret)
{
    struct gm_shared_key *k = OPENSSL_zalloc(sizeof *k);

    if (!k)
        return gm_blame(ret, GM_KERNEL, ENOMEM, "TLS");
    if (!*name || strlen(name) > GM_TLS_NAME || length < GM_TLS_MIN_KEY || length > GM_TLS_MAX_KEY) {
        OPENSSL_free(k);
        return gm_blame(ret, GM_KERNEL, EINVAL, "TLS: pre-shared key of %u bytes", length);
    }
    memcpy(k->name, name, strlen(name));
    memcpy(k->key, key, length);
    k->length = length;
    k->next = keys_of(c->ssl);
    if (!SSL_CTX_set_ex_data(c->ssl, keys_index, k)) {
        OPENSSL_clear_free(k, sizeof *k);
        return gm_blame(ret, GM_KERNEL, ENOMEM, "TLS");
    }
    return 0;
}

int64_t gm_tls_context_describe(const struct gm_tls_context *c, char *out)
{
    X509 *own = SSL_CTX_get0_certificate(c->ssl);

    out[0] = '\0';
    if (!own)
        return 0;
    gm_certificate_describe(own, out, GM_TLS_TEXT);
    return gm_seconds_to(X509_get0_notAfter(own));
}
