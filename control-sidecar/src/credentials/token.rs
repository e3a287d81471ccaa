//! Token: bearer tokens, the simple way to say who may attach.
//!
//! A file holds one token a line. Several are accepted at the same time, so that
//! one can be replaced without a gap: add the new one, let the clients change
//! over, remove the old one.

use tonic::codegen::http::{HeaderMap, header::AUTHORIZATION};

use super::CredentialError;
use crate::limits::{TOKEN_BYTES, TOKENS_MAX};

/// Why a request is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// It carries no bearer token, or several.
    Missing,
    /// It carries another one.
    Wrong,
}

impl Refusal {
    /// Fixed word for metrics.
    #[must_use]
    pub fn reason(self) -> &'static str {
        match self {
            Self::Missing => "no_token",
            Self::Wrong => "wrong_token",
        }
    }
}

/// The tokens that are accepted. Kept as their hashes: nothing of them can get
/// into a log, and the time that a comparison takes tells nothing of them.
#[derive(Clone, Debug)]
pub struct Tokens(Vec<blake3::Hash>);

impl Tokens {
    /// Reads a file of tokens.
    ///
    /// # Errors
    ///
    /// [`CredentialError::BadToken`].
    pub fn parse(file: &[u8]) -> Result<Self, CredentialError> {
        let lines = file.split(|byte| *byte == b'\n').map(<[u8]>::trim_ascii);
        let tokens: Vec<&[u8]> = lines.filter(|line| !line.is_empty()).collect();
        let is_good = |token: &&[u8]| {
            TOKEN_BYTES.contains(&token.len()) && token.iter().all(u8::is_ascii_graphic)
        };
        if tokens.is_empty() || tokens.len() > TOKENS_MAX || !tokens.iter().all(is_good) {
            return Err(CredentialError::BadToken);
        }
        Ok(Self(tokens.into_iter().map(blake3::hash).collect()))
    }

    /// Checks a request's `authorization` header.
    ///
    /// # Errors
    ///
    /// A [`Refusal`].
    pub fn check(&self, headers: &HeaderMap) -> Result<(), Refusal> {
        let mut values = headers.get_all(AUTHORIZATION).iter();
        let (Some(value), None) = (values.next(), values.next()) else {
            return Err(Refusal::Missing);
        };
        let (scheme, token) =
            value.as_bytes().split_at_checked(b"Bearer ".len()).ok_or(Refusal::Missing)?;
        if !scheme.eq_ignore_ascii_case(b"Bearer ") {
            return Err(Refusal::Missing);
        }
        let given = blake3::hash(token.trim_ascii());
        // Hashes are compared in constant time, and always with all.
        let matches = self.0.iter().filter(|token| **token == given).count();
        if matches > 0 { Ok(()) } else { Err(Refusal::Wrong) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FIRST: &str = "first-token-0123456789";
    const SECOND: &str = "second-token-0123456789";

    fn headers(values: &[&str]) -> HeaderMap {
        let mut headers = HeaderMap::new();
        for value in values {
            headers.append(AUTHORIZATION, value.parse().unwrap());
        }
        headers
    }

    #[test]
    fn each_token_of_the_file_is_accepted_and_no_other() {
        let tokens = Tokens::parse(format!("{FIRST}\r\n\n  {SECOND}\n").as_bytes()).unwrap();
        for good in [FIRST, SECOND] {
            for scheme in ["Bearer", "bearer", "BEARER"] {
                assert_eq!(tokens.check(&headers(&[&format!("{scheme} {good}")])), Ok(()));
            }
        }
        let cut = FIRST.trim_end_matches(char::is_numeric);
        for wrong in [cut, &format!("{FIRST}x"), "", &FIRST.to_uppercase()] {
            let given = headers(&[&format!("Bearer {wrong}")]);
            assert_eq!(tokens.check(&given), Err(Refusal::Wrong), "{wrong:?}");
        }
        let both = [format!("Bearer {FIRST}"), format!("Bearer {FIRST}")];
        for missing in [
            headers(&[]),
            headers(&[FIRST]),
            headers(&[&format!("Basic {FIRST}")]),
            headers(&[&format!("Bearer{FIRST}")]),
            headers(&[&both[0], &both[1]]),
        ] {
            assert_eq!(tokens.check(&missing), Err(Refusal::Missing), "{missing:?}");
        }
    }

    #[test]
    fn a_file_without_good_tokens_is_refused() {
        let many = format!("{FIRST}\n").repeat(TOKENS_MAX + 1);
        let long = "x".repeat(TOKEN_BYTES.end() + 1);
        for bad in
            ["", "\n \n", "short", "with a space in it 0123", &many, &long, "ünïcödé-0123456789"]
        {
            let read = Tokens::parse(bad.as_bytes()).map(|_| ());
            assert_eq!(read, Err(CredentialError::BadToken), "{bad:?}");
        }
    }

    /// Goal: whatever prints it, a token is not in what is printed.
    #[test]
    fn tokens_are_not_printed() {
        let printed = format!("{:?}", Tokens::parse(FIRST.as_bytes()).unwrap());
        assert!(!printed.contains("first-token"), "{printed}");
    }
}
