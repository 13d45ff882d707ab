/* Inside of a TLS context, for the session. */
#ifndef GM_TLS_CONTEXT_H
#define GM_TLS_CONTEXT_H

#include "tls.h"

#include <openssl/ssl.h>
#include <stdbool.h>

struct gm_shared_key {
    struct gm_shared_key *next;
    char name[GM_TLS_NAME + 1];
    unsigned char key[GM_TLS_MAX_KEY];
    uint32_t length;
};

/* The keys are counted with the SSL_CTX, which sessions hold on to. */
struct gm_tls_context {
    SSL_CTX *ssl;
    int server;
    X509_CRL *list; /* of the lists of revoked certificates, the one that ends first */
};

/* What a session found out while it shook hands; the SSL's application data. */
struct gm_tls_peer {
    const struct gm_shared_key *shared; /* the key that the peer named */
    char refused[160];                  /* why its certificate is, if it is */
    char certificate[GM_TLS_TEXT];
};

/* For OpenSSL, which would ask for one on the terminal. */
int gm_tls_no_password(char *to, int room, int writing, void *data);

/* Whether nothing came behind the last that OpenSSL could read of a text: to it, both are errors. */
bool gm_pem_ended(void);

/* In our words, what is wrong with a list of revoked certificates, of X509_V_ERR_…; NULL if that is about something else. */
const char *gm_list_trouble(int error);

#endif
