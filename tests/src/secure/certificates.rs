//! Certificates: an authority of a test's own, and what it signs.

use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DnType, ExtendedKeyUsagePurpose, IsCa,
    KeyPair, KeyUsagePurpose, SanType, date_time_ymd,
};

/// Signs certificates.
pub struct Authority(CertifiedIssuer<'static, KeyPair>);

/// A certificate and its private key, PEM.
#[derive(Clone, Debug)]
pub struct Signed {
    /// The certificate.
    pub certificate: String,
    /// Its private key.
    pub key: String,
}

/// When a certificate is valid.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Valid {
    /// Now.
    Now,
    /// Not any more.
    Ended,
    /// Not yet.
    Later,
}

/// Why a certificate could not be made; a mistake of the caller's.
pub type Error = rcgen::Error;

impl Authority {
    /// A new one.
    ///
    /// # Errors
    ///
    /// If there is no randomness for its key.
    pub fn new(name: &str) -> Result<Self, Error> {
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        CertifiedIssuer::self_signed(params, KeyPair::generate()?).map(Self)
    }

    /// Its own certificate, PEM.
    #[must_use]
    pub fn certificate(&self) -> String {
        self.0.pem()
    }

    /// Signs a certificate for both ends of a connection.
    ///
    /// - `names`: DNS names, and URIs, which have `://`.
    ///
    /// # Errors
    ///
    /// If a name cannot be in a certificate.
    pub fn sign(&self, names: &[&str], valid: Valid) -> Result<Signed, Error> {
        let mut params = CertificateParams::default();
        // Those of the mesh's workloads carry nothing here either.
        params.distinguished_name = rcgen::DistinguishedName::new();
        for name in names {
            let text = (*name).try_into()?;
            params.subject_alt_names.push(if name.contains("://") {
                SanType::URI(text)
            } else {
                SanType::DnsName(text)
            });
        }
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        let (from, to) = match valid {
            Valid::Now => (2020, 2090),
            Valid::Ended => (2020, 2021),
            Valid::Later => (2090, 2091),
        };
        params.not_before = date_time_ymd(from, 1, 1);
        params.not_after = date_time_ymd(to, 1, 1);
        let key = KeyPair::generate()?;
        let certificate = params.signed_by(&key, &self.0)?;
        Ok(Signed { certificate: certificate.pem(), key: key.serialize_pem() })
    }
}
