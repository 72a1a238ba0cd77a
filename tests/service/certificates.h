#ifndef TENON_TESTS_SERVICE_CERTIFICATES_H_
#define TENON_TESTS_SERVICE_CERTIFICATES_H_

#include <openssl/evp.h>
#include <openssl/pem.h>
#include <openssl/x509v3.h>

#include <fstream>
#include <memory>
#include <string>
#include <utility>

namespace tenon::service {

// A key and its certificate in PEM.
struct Certificate {
  std::string key;
  std::string chain;
};

// Makes certificates for tests.
class TestCa {
 public:
  explicit TestCa(const std::string& name)
      : key_(EVP_EC_gen("P-256"), EVP_PKEY_free),
        certificate_(Make(name, key_.get(), 3600), X509_free) {
    Extend(certificate_.get(), NID_basic_constraints, "critical,CA:TRUE");
    X509_sign(certificate_.get(), key_.get(), EVP_sha256());
  }

  std::string pem() const { return Pem(certificate_.get()); }

  // For 127.0.0.1; valid for so long from an hour ago.
  Certificate Issue(const std::string& name, long seconds = 2 * 3600) const {
    const Key key(EVP_EC_gen("P-256"), EVP_PKEY_free);
    const Cert certificate(Make(name, key.get(), seconds - 3600), X509_free);
    X509_set_issuer_name(certificate.get(),
                         X509_get_subject_name(certificate_.get()));
    Extend(certificate.get(), NID_subject_alt_name, "IP:127.0.0.1");
    X509_sign(certificate.get(), key_.get(), EVP_sha256());
    return {Pem(key.get()), Pem(certificate.get())};
  }

 private:
  using Key = std::unique_ptr<EVP_PKEY, decltype(&EVP_PKEY_free)>;
  using Cert = std::unique_ptr<X509, decltype(&X509_free)>;
  using Bio = std::unique_ptr<BIO, decltype(&BIO_free)>;

  static X509* Make(const std::string& name, EVP_PKEY* key,
                    long seconds_from_now) {
    static long serial = 0;
    X509* certificate = X509_new();
    X509_set_version(certificate, 2);
    ASN1_INTEGER_set(X509_get_serialNumber(certificate), ++serial);
    X509_gmtime_adj(X509_getm_notBefore(certificate), -3600);
    X509_gmtime_adj(X509_getm_notAfter(certificate), seconds_from_now);
    X509_set_pubkey(certificate, key);
    X509_NAME* subject = X509_get_subject_name(certificate);
    X509_NAME_add_entry_by_txt(
        subject, "CN", MBSTRING_ASC,
        reinterpret_cast<const unsigned char*>(name.c_str()), -1, -1, 0);
    X509_set_issuer_name(certificate, subject);
    return certificate;
  }

  static void Extend(X509* certificate, int nid, const char* value) {
    X509_EXTENSION* extension =
        X509V3_EXT_conf_nid(nullptr, nullptr, nid, value);
    X509_add_ext(certificate, extension, -1);
    X509_EXTENSION_free(extension);
  }

  static std::string Text(BIO* bio) {
    char* data = nullptr;
    const long size = BIO_get_mem_data(bio, &data);
    return std::string(data, static_cast<size_t>(size));
  }
  static std::string Pem(X509* certificate) {
    const Bio bio(BIO_new(BIO_s_mem()), BIO_free);
    PEM_write_bio_X509(bio.get(), certificate);
    return Text(bio.get());
  }
  static std::string Pem(EVP_PKEY* key) {
    const Bio bio(BIO_new(BIO_s_mem()), BIO_free);
    PEM_write_bio_PrivateKey(bio.get(), key, nullptr, nullptr, 0, nullptr,
                             nullptr);
    return Text(bio.get());
  }

  Key key_;
  Cert certificate_;
};

inline void WriteFile(const std::string& path, const std::string& text) {
  // At once, as a careful administrator does.
  const std::string temporary = path + ".new";
  std::ofstream(temporary) << text;
  std::rename(temporary.c_str(), path.c_str());
}

}  // namespace tenon::service

#endif  // TENON_TESTS_SERVICE_CERTIFICATES_H_
