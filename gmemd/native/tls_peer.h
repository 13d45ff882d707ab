/* What a certificate says, and what went wrong in TLS, in words. What comes from the peer is escaped and cut. */
#ifndef GM_TLS_PEER_H
#define GM_TLS_PEER_H

#include "problem.h"

#include <openssl/x509.h>
#include <stddef.h>

/* From now on; less than 0 if it is over, 0 if that cannot be said. */
int64_t gm_seconds_to(const ASN1_TIME *when);

/* Subject, names, issuer and validity. */
void gm_certificate_describe(X509 *certificate, char *out, size_t room);

/* Issuer and validity. */
void gm_list_describe(const X509_CRL *list, char *out, size_t room);

/* Whether the certificate names `name`, see gm_tls_peer_is(). The subject does not count, and stars stand for nothing. */
int gm_certificate_names(X509 *certificate, const char *name);

/* Blames from OpenSSL's errors, unless a certificate was refused: `why_refused` is "" if none was, `certificate` describes it. */
int gm_tls_blame(struct gm_problem *ret, const char *doing, const char *why_refused, const char *certificate);

#endif
