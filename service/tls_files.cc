#include "service/tls_files.h"

#include <fcntl.h>
#include <openssl/err.h>
#include <openssl/pem.h>
#include <openssl/ssl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <fstream>
#include <memory>

namespace tenon::service {
namespace {

template <class T, void (*kFree)(T*)>
struct Freer {
  void operator()(T* p) const { kFree(p); }
};
void FreeBio(BIO* bio) { BIO_free(bio); }
using Bio = std::unique_ptr<BIO, Freer<BIO, FreeBio>>;
using Cert = std::unique_ptr<X509, Freer<X509, X509_free>>;
using Key = std::unique_ptr<EVP_PKEY, Freer<EVP_PKEY, EVP_PKEY_free>>;
using Context = std::unique_ptr<SSL_CTX, Freer<SSL_CTX, SSL_CTX_free>>;

// What OpenSSL found wrong last.
std::string Reason() {
  const char* reason = ERR_reason_error_string(ERR_peek_last_error());
  ERR_clear_error();
  return reason == nullptr ? "not understood" : reason;
}

StatusOr<Bio> Open(const std::string& path) {
  std::ifstream file(path);
  std::string text;
  std::getline(file, text, '\0');
  if (!file.is_open() || file.bad()) {
    return NotFoundError(path, ": cannot be read");
  }
  Bio bio(BIO_new(BIO_s_mem()));
  BIO_write(bio.get(), text.data(), static_cast<int>(text.size()));
  return bio;
}

// Writes the certificates of a file to `out`; the first one to `first`.
Status CopyCertificates(const std::string& path, BIO* out, Cert* first) {
  StatusOr<Bio> in = Open(path);
  TENON_RETURN_IF_ERROR(in.status());
  ERR_clear_error();
  while (Cert next{PEM_read_bio_X509(in->get(), nullptr, nullptr, nullptr)}) {
    PEM_write_bio_X509(out, next.get());
    if (*first == nullptr) *first = std::move(next);
  }
  const bool at_end =
      ERR_GET_REASON(ERR_peek_last_error()) == PEM_R_NO_START_LINE;
  if (*first == nullptr && at_end) {
    return InvalidArgumentError(path, ": has no certificate");
  }
  if (!at_end) return InvalidArgumentError(path, ": certificate: ", Reason());
  ERR_clear_error();
  return Status();
}

std::string TextOf(BIO* bio) {
  char* data = nullptr;
  const long size = BIO_get_mem_data(bio, &data);
  return std::string(data, static_cast<size_t>(size));
}

StatusOr<std::string> ReadIdentity(const std::string& cert_path,
                                   const std::string& key_path) {
  const Bio out(BIO_new(BIO_s_mem()));
  StatusOr<Bio> in = Open(key_path);
  TENON_RETURN_IF_ERROR(in.status());
  char no_password[] = "";  // and no question at the terminal
  const Key key(
      PEM_read_bio_PrivateKey(in->get(), nullptr, nullptr, no_password));
  if (key == nullptr) {
    return InvalidArgumentError(key_path, ": private key: ", Reason());
  }
  PEM_write_bio_PrivateKey(out.get(), key.get(), nullptr, nullptr, 0, nullptr,
                           nullptr);
  Cert cert;
  TENON_RETURN_IF_ERROR(CopyCertificates(cert_path, out.get(), &cert));
  const Context context(SSL_CTX_new(TLS_server_method()));
  if (SSL_CTX_use_certificate(context.get(), cert.get()) != 1) {
    return InvalidArgumentError(cert_path, ": ", Reason());
  }
  if (SSL_CTX_use_PrivateKey(context.get(), key.get()) != 1) {
    return InvalidArgumentError(key_path, " is not the key of ", cert_path,
                                ": ", Reason());
  }
  return TextOf(out.get());
}

}  // namespace

MemoryFile::~MemoryFile() {
  if (fd_ >= 0) close(fd_);
}

Status MemoryFile::Set(const std::string& content) {
  const int fd = memfd_create("tenon-tls", MFD_CLOEXEC);
  if (fd < 0) return UnavailableError("memfd_create: ", strerror(errno));
  const bool written = write(fd, content.data(), content.size()) ==
                       static_cast<ssize_t>(content.size());
  if (!written || (fd_ >= 0 && dup3(fd, fd_, O_CLOEXEC) < 0)) {
    const Status status = UnavailableError("memfd: ", strerror(errno));
    close(fd);
    return status;
  }
  if (fd_ < 0) {
    fd_ = fd;
  } else {
    close(fd);
  }
  return Status();
}

std::string MemoryFile::path() const {
  return "/proc/self/fd/" + std::to_string(fd_);
}

Status TlsFiles::Load() {
  StatusOr<std::string> identity = ReadIdentity(cert_, key_);
  TENON_RETURN_IF_ERROR(identity.status());
  std::string roots;
  if (!client_ca_.empty()) {
    const Bio out(BIO_new(BIO_s_mem()));
    Cert first;
    TENON_RETURN_IF_ERROR(CopyCertificates(client_ca_, out.get(), &first));
    roots = TextOf(out.get());
  }
  TENON_RETURN_IF_ERROR(identity_.Set(*identity));
  return client_ca_.empty() ? Status() : roots_.Set(roots);
}

}  // namespace tenon::service
