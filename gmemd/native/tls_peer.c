#include "tls_peer.h"

#include <arpa/inet.h>
#include <openssl/err.h>
#include <openssl/ssl.h>
#include <openssl/x509v3.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <string.h>
#include <time.h>

/* A name of an honest certificate is shorter; one that is not must not push the rest out of the message. */
enum { NAME = 80, NAMES = 160 };

/* Text of bounded size. */
struct text {
    char *to;
    size_t room, used;
};

__attribute__((format(printf, 2, 3))) static void add(struct text *t, const char *format, ...)
{
    va_list args;
    int length;

    va_start(args, format);
    length = vsnprintf(t->to + t->used, t->room - t->used, format, args);
    va_end(args);
    if (length > 0)
        t->used = t->used + (size_t)length < t->room ? t->used + (size_t)length : t->room - 1;
}

static void add_escaped(struct text *t, const unsigned char *from, size_t length)
{
    for (size_t i = 0; i < length && i < NAME; i++) {
        bool plain = from[i] > ' ' && from[i] < 0x7f && from[i] != '\\' && from[i] != '"';

        add(t, plain ? "%c" : "\\x%02x", from[i]);
    }
    if (length > NAME)
        add(t, "...");
}

static void add_name(struct text *t, const X509_NAME *name)
{
    BIO *bio = BIO_new(BIO_s_mem());
    char *from;
    long length;

    if (bio && X509_NAME_print_ex(bio, name, 0, XN_FLAG_RFC2253) >= 0) {
        length = BIO_get_mem_data(bio, &from);
        add(t, "%.*s%s", length < NAME ? (int)length : NAME, length ? from : "", length > NAME ? "..." : "");
    }
    BIO_free(bio);
}

static void add_time(struct text *t, const ASN1_TIME *when)
{
    struct tm tm;
    char out[32];

    if (ASN1_TIME_to_tm(when, &tm) && strftime(out, sizeof out, "%Y-%m-%dT%H:%M:%SZ", &tm))
        add(t, "%s", out);
    else
        add(t, "(not a time)");
}

static void add_general_name(struct text *t, const GENERAL_NAME *name)
{
    char address[INET6_ADDRSTRLEN] = "";
    int type;
    const ASN1_STRING *value = GENERAL_NAME_get0_value(name, &type);

    if (type == GEN_DNS || type == GEN_URI) {
        add(t, type == GEN_DNS ? "DNS:" : "URI:");
        add_escaped(t, ASN1_STRING_get0_data(value), (size_t)ASN1_STRING_length(value));
    } else if (type == GEN_IPADD) {
        inet_ntop(ASN1_STRING_length(value) == 4 ? AF_INET : AF_INET6,
                  ASN1_STRING_length(value) == 4 || ASN1_STRING_length(value) == 16 ? ASN1_STRING_get0_data(value)
                                                                                    : (const void *)&in6addr_any,
                  address, sizeof address);
        add(t, "IP:%s", address);
    } else {
        add(t, "(other)");
    }
}

static void add_names(struct text *t, X509 *certificate)
{
    GENERAL_NAMES *names = X509_get_ext_d2i(certificate, NID_subject_alt_name, NULL, NULL);
    int count = names ? sk_GENERAL_NAME_num(names) : 0;
    size_t end = t->used + NAMES;

    add(t, count ? "names " : "no names");
    for (int i = 0; i < count; i++) {
        if (t->used > end) {
            add(t, " and %d more", count - i);
            break;
        }
        add(t, i ? " " : "");
        add_general_name(t, sk_GENERAL_NAME_value(names, i));
    }
    GENERAL_NAMES_free(names);
}

int64_t gm_seconds_to(const ASN1_TIME *when)
{
    int days, seconds;

    return ASN1_TIME_diff(&days, &seconds, NULL, when) ? (int64_t)days * 24 * 3600 + seconds : 0;
}

void gm_certificate_describe(X509 *certificate, char *out, size_t room)
{
    struct text t = {.to = out, .room = room};

    add(&t, "certificate \"");
    add_name(&t, X509_get_subject_name(certificate));
    add(&t, "\", ");
    add_names(&t, certificate);
    add(&t, ", issuer \"");
    add_name(&t, X509_get_issuer_name(certificate));
    add(&t, "\", valid ");
    add_time(&t, X509_get0_notBefore(certificate));
    add(&t, " to ");
    add_time(&t, X509_get0_notAfter(certificate));
}

void gm_list_describe(const X509_CRL *list, char *out, size_t room)
{
    struct text t = {.to = out, .room = room};

    add(&t, "revoked certificates of \"");
    add_name(&t, X509_CRL_get_issuer(list));
    add(&t, "\", valid ");
    add_time(&t, X509_CRL_get0_lastUpdate(list));
    add(&t, " to ");
    add_time(&t, X509_CRL_get0_nextUpdate(list));
}

static bool has_uri(X509 *certificate, const char *uri)
{
    GENERAL_NAMES *names = X509_get_ext_d2i(certificate, NID_subject_alt_name, NULL, NULL);
    bool found = false;

    for (int i = 0; names && !found && i < sk_GENERAL_NAME_num(names); i++) {
        int type;
        const ASN1_STRING *value = GENERAL_NAME_get0_value(sk_GENERAL_NAME_value(names, i), &type);

        found = type == GEN_URI && (size_t)ASN1_STRING_length(value) == strlen(uri) &&
                !memcmp(ASN1_STRING_get0_data(value), uri, strlen(uri));
    }
    GENERAL_NAMES_free(names);
    return found;
}

int gm_certificate_names(X509 *certificate, const char *name)
{
    unsigned char address[16];

    if (strstr(name, "://"))
        return has_uri(certificate, name);
    if (inet_pton(AF_INET, name, address) == 1 || inet_pton(AF_INET6, name, address) == 1)
        return X509_check_ip_asc(certificate, name, 0) == 1;
    return X509_check_host(certificate, name, strlen(name),
                           X509_CHECK_FLAG_NEVER_CHECK_SUBJECT | X509_CHECK_FLAG_NO_WILDCARDS, NULL) == 1;
}

/* Errors of OpenSSL that say who is at fault, in our words. All others are the connection's: a flipped bit looks like any of them. */
static const struct {
    int reason;
    const char *text;
} refusals[] = {
    {SSL_R_PEER_DID_NOT_RETURN_A_CERTIFICATE, "it shows no certificate"},
    {SSL_R_WRONG_VERSION_NUMBER, "it does not speak TLS"},
    {SSL_R_HTTP_REQUEST, "it does not speak TLS"},
    {SSL_R_UNSUPPORTED_PROTOCOL, "it does not speak TLS 1.3"},
    {SSL_R_BINDER_DOES_NOT_VERIFY, "its pre-shared key is not ours of that name"},
    {SSL_R_NO_SUITABLE_SIGNATURE_ALGORITHM, "it shares no key with us, and we have no certificate to show"},
};

/* Alerts of a peer that cannot read what came: what we sent was spoilt under way. */
static bool unreadable(int alert)
{
    return alert == SSL_AD_BAD_RECORD_MAC || alert == SSL_AD_RECORD_OVERFLOW || alert == SSL_AD_UNEXPECTED_MESSAGE;
}

static const char *alert_text(int alert)
{
    if (alert == SSL_AD_CERTIFICATE_UNKNOWN)
        return "certificate unknown: its own log says why";
    return SSL_alert_desc_string_long(alert);
}

int gm_tls_blame(struct gm_problem *ret, const char *doing, const char *why_refused, const char *certificate)
{
    unsigned long error = ERR_peek_error();
    int reason = ERR_GET_REASON(error);
    const char *text = ERR_reason_error_string(error);

    ERR_clear_error();
    if (*why_refused) /* whatever OpenSSL came across on its way to that */
        return gm_blame(ret, GM_UNTRUSTED, 0, "TLS: %s: %s", why_refused, certificate);
    if (!error)
        return gm_blame(ret, GM_LINK, 0, "TLS: %s", doing);
    if (ERR_SYSTEM_ERROR(error))
        return gm_blame(ret, GM_LINK, reason, "TLS: %s", doing);
    if (ERR_GET_LIB(error) == ERR_LIB_SSL) {
        if (reason >= SSL_AD_REASON_OFFSET && unreadable(reason - SSL_AD_REASON_OFFSET))
            return gm_blame(ret, GM_LINK, 0, "TLS: it cannot read us: %s",
                            SSL_alert_desc_string_long(reason - SSL_AD_REASON_OFFSET));
        if (reason >= SSL_AD_REASON_OFFSET)
            return gm_blame(ret, GM_UNTRUSTED, 0, "TLS: it refuses us: %s", alert_text(reason - SSL_AD_REASON_OFFSET));
        for (size_t i = 0; i < sizeof refusals / sizeof *refusals; i++)
            if (refusals[i].reason == reason)
                return gm_blame(ret, GM_UNTRUSTED, 0, "TLS: %s", refusals[i].text);
    }
    return gm_blame(ret, GM_LINK, 0, "TLS: %s: %s", doing, text ? text : "no reason known");
}
