/*
 * Lists of revoked certificates. Once there is one, every authority in a peer's chain has to have a list, signed by it and in its time:
 * a peer of which that cannot be said is refused like one that is on it.
 */
#include "tls_context.h"
#include "tls_peer.h"

#include <openssl/err.h>
#include <openssl/pem.h>
#include <openssl/x509_vfy.h>
#include <stdbool.h>

/* What OpenSSL finds, in our words. */
static const struct {
    int error;
    const char *text;
} troubles[] = {
    {X509_V_ERR_UNABLE_TO_GET_CRL, "we have no list of what its issuer has revoked"},
    {X509_V_ERR_CRL_HAS_EXPIRED, "our list of what its issuer has revoked has expired"},
    {X509_V_ERR_CRL_NOT_YET_VALID, "our list of what its issuer has revoked is not valid yet"},
    {X509_V_ERR_CRL_SIGNATURE_FAILURE, "our list of what its issuer has revoked has a wrong signature"},
};

const char *gm_list_trouble(int error)
{
    for (size_t i = 0; i < sizeof troubles / sizeof *troubles; i++)
        if (troubles[i].error == error)
            return troubles[i].text;
    return NULL;
}

static bool ends_first(const struct gm_tls_context *c, const X509_CRL *list)
{
    return !c->list || ASN1_TIME_compare(X509_CRL_get0_nextUpdate(list), X509_CRL_get0_nextUpdate(c->list)) < 0;
}

/* Takes the reference. NULL, or what is wrong with the list. */
static const char *add_list(struct gm_tls_context *c, X509_CRL *list)
{
    const char *wrong = NULL;

    if (!X509_CRL_get0_nextUpdate(list))
        wrong = "a list that does not say until when it is good (nextUpdate)";
    else if (!X509_STORE_add_crl(SSL_CTX_get_cert_store(c->ssl), list))
        wrong = "a list that cannot be used";
    if (wrong || !ends_first(c, list)) {
        X509_CRL_free(list);
        return wrong;
    }
    X509_CRL_free(c->list);
    c->list = list;
    return NULL;
}

static const char *add_lists(struct gm_tls_context *c, BIO *from)
{
    const char *wrong = NULL;
    X509_CRL *list;

    while (!wrong && (list = PEM_read_bio_X509_CRL(from, NULL, gm_tls_no_password, NULL)))
        wrong = add_list(c, list);
    /* One that is not whole must not count as none. */
    if (!wrong && (!gm_pem_ended() || !c->list))
        wrong = "not a list of revoked certificates in PEM";
    return wrong;
}

int gm_tls_context_revoke(struct gm_tls_context *c, const char *crl, struct gm_problem *ret)
{
    BIO *from = BIO_new_mem_buf(crl, -1);
    const char *wrong = from ? add_lists(c, from) : "no memory";

    BIO_free(from);
    ERR_clear_error();
    if (wrong)
        return gm_blame(ret, GM_KERNEL, 0, "%s", wrong);
    X509_STORE_set_flags(SSL_CTX_get_cert_store(c->ssl), X509_V_FLAG_CRL_CHECK | X509_V_FLAG_CRL_CHECK_ALL);
    return 0;
}

int64_t gm_tls_context_describe_list(const struct gm_tls_context *c, char *out)
{
    out[0] = '\0';
    if (!c->list)
        return 0;
    gm_list_describe(c->list, out, GM_TLS_TEXT);
    return gm_seconds_to(X509_CRL_get0_nextUpdate(c->list));
}
