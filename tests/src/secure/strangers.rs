//! Strangers: a gateway and a sidecar that do not prove who they are, or no longer.
//!
//! The feed runs over mutual TLS with a token. Then one thing after the other does
//! not fit any more, and the sidecar is killed and started again, so that the gateway
//! has to attach anew. It must be refused and counted under the right reason, and the
//! gateway must go on routing by what it knows. When everything fits again, the feed
//! must come back without a restart of Envoy.

use std::path::PathBuf;
use std::time::Duration;

use super::certificates::{Authority, Signed, Valid};
use super::place::{Place, Plan, replace, until};
use super::{GATEWAY, SIDECAR};
use crate::stack::launch::engine_name;
use crate::stack::limits::{CATCH_UP_WITHIN, ENGINES};
use crate::stack::options::Options;
use crate::stack::report::Report;

const TOKEN: &str = "the-token-of-this-run-0123456789";

/// Requests while the feed is refused.
const REQUESTS: u32 = 24;

/// Longest time for the feed to come back.
const BACK_WITHIN: Duration = Duration::from_secs(20);

/// What the sidecar's feed is asked to be.
fn mtls(port: u16) -> String {
    format!(
        "listen: \"127.0.0.1:{port}\", token_file: tokens, tls: {{certificate: sidecar.pem, key: \
         sidecar.key, client_ca: clients.pem, allowed_names: [{GATEWAY:?}]}}"
    )
}

/// The certificates and tokens of the run, in the place's folder.
struct Files {
    folder: PathBuf,
    authority: Authority,
    other: Authority,
}

impl Files {
    fn new(folder: PathBuf) -> Result<Self, Box<dyn std::error::Error>> {
        let files =
            Self { folder, authority: Authority::new("mesh")?, other: Authority::new("mesh")? };
        files.write("ca.pem", &files.authority.certificate())?;
        files.restore()?;
        Ok(files)
    }

    fn write(&self, name: &str, text: &str) -> std::io::Result<()> {
        replace(&self.folder.join(name), text)
    }

    fn pair(&self, name: &str, signed: &Signed) -> std::io::Result<()> {
        self.write(&format!("{name}.pem"), &signed.certificate)?;
        self.write(&format!("{name}.key"), &signed.key)
    }

    /// Everything as it should be.
    fn restore(&self) -> Result<(), Box<dyn std::error::Error>> {
        self.pair("gateway", &self.authority.sign(&[GATEWAY], Valid::Now)?)?;
        self.pair("sidecar", &self.authority.sign(&[SIDECAR], Valid::Now)?)?;
        self.write("clients.pem", &self.authority.certificate())?;
        self.write("token", TOKEN)?;
        self.write("tokens", TOKEN)?;
        Ok(())
    }
}

/// What does not fit.
#[derive(Clone, Copy, Debug)]
enum Wrong {
    GatewayAuthority,
    GatewayExpired,
    GatewayName,
    SidecarAuthority,
    SidecarExpired,
    SidecarName,
    Token,
}

impl Wrong {
    const ALL: [(Self, &'static str, &'static str); 7] = [
        (
            Self::GatewayAuthority,
            "the gateway's certificate is of another authority",
            "unknown_issuer",
        ),
        (Self::GatewayExpired, "the gateway's certificate has expired", "expired"),
        (Self::GatewayName, "the gateway's certificate has another name", "wrong_name"),
        (
            Self::SidecarAuthority,
            "the sidecar's certificate is of another authority",
            "refused_by_client",
        ),
        (Self::SidecarExpired, "the sidecar's certificate has expired", "refused_by_client"),
        (Self::SidecarName, "the sidecar's certificate has another name", "refused_by_client"),
        (Self::Token, "the token is another one", "wrong_token"),
    ];

    /// Makes it so. Returns whether Envoy has files to read again.
    fn make(self, files: &Files) -> Result<bool, Box<dyn std::error::Error>> {
        let (own, other) = (&files.authority, &files.other);
        match self {
            Self::GatewayAuthority => {
                files.pair("gateway", &other.sign(&[GATEWAY], Valid::Now)?)?
            }
            Self::GatewayExpired => files.pair("gateway", &own.sign(&[GATEWAY], Valid::Ended)?)?,
            Self::GatewayName => files.pair("gateway", &own.sign(&[SIDECAR], Valid::Now)?)?,
            Self::SidecarAuthority => {
                files.pair("sidecar", &other.sign(&[SIDECAR], Valid::Now)?)?
            }
            Self::SidecarExpired => files.pair("sidecar", &own.sign(&[SIDECAR], Valid::Ended)?)?,
            Self::SidecarName => files.pair("sidecar", &own.sign(&[GATEWAY], Valid::Now)?)?,
            Self::Token => files.write("tokens", "another-token-0123456789")?,
        }
        Ok(matches!(self, Self::GatewayAuthority | Self::GatewayExpired | Self::GatewayName))
    }
}

/// Makes the checks of mutual TLS and tokens.
pub(super) async fn check(options: &Options, report: &mut Report) {
    let mut place = match Place::engines(options).await {
        Ok(place) => place,
        Err(error) => return report.failure("the engines start", error),
    };
    if let Err(error) = checks(&mut place, options, report).await {
        report.failure("the feed over mutual TLS", error);
    }
    if let Some(ended) = place.ended() {
        report.failure("every process is alive", ended);
    }
    if report.has_failures() {
        crate::stack::report::line(format_args!("logs: {}", place.keep().display()));
    }
    place.stop().await;
}

async fn checks(
    place: &mut Place,
    options: &Options,
    report: &mut Report,
) -> Result<(), Box<dyn std::error::Error>> {
    let files = Files::new(place.folder.clone())?;
    let plan = Plan { feed: mtls(place.feed_port), template: "envoy.yaml", ..Plan::default() };
    let without_token = cluster(options, "mtls.yaml")?;
    let plan = Plan { cluster: both(options)?, ..plan };
    place.start_sidecar(&plan).await?;
    place.start_envoy(&plan).await?;
    let took = place.until_warm(BACK_WITHIN * 3).await?;
    report.check(
        "a feed over mutual TLS with a token",
        true,
        format_args!("warm after {:.1} s", took.as_secs_f64()),
    );
    let prompt = "a prompt that one engine holds ".repeat(60);
    let home = settle(place, &prompt).await?;
    for (wrong, what, reason) in Wrong::ALL {
        let outcome = refused(place, &files, &plan, wrong, reason, (&prompt, &home)).await;
        match outcome {
            Ok(figures) => report.check(what, true, figures),
            Err(error) => report.failure(what, error),
        }
        files.restore()?;
        place
            .until_warm(BACK_WITHIN)
            .await
            .map_err(|error| format!("{what}: after it: {error}"))?;
    }
    report.check("the feed comes back each time", true, format_args!("{} times", Wrong::ALL.len()));
    let no_token = Plan { cluster: without_token, ..plan };
    let figures = never_attached(place, &no_token).await?;
    report.check("a gateway without a token", true, figures);
    Ok(())
}

/// Makes one engine hold the prompt, and the gateway know it.
async fn settle(place: &Place, prompt: &str) -> Result<String, String> {
    let first = place.ask(prompt).await?;
    let home = first.engine().ok_or("no engine named itself")?.to_owned();
    let known = async || match place.ask(prompt).await {
        Ok(answer) if is_home(&answer, &home) => 1,
        _ => 0,
    };
    until("the prompt is known", 1, known).await?;
    Ok(home)
}

/// Whether an answer came by the cache that was predicted.
fn is_home(answer: &crate::stack::client::Answer, home: &str) -> bool {
    answer.engine() == Some(home)
        && answer.cached_tokens > 0
        && answer.predicted_tokens() == Some(answer.cached_tokens)
}

/// Makes something wrong, lets the gateway attach anew, and looks at what happens.
async fn refused(
    place: &mut Place,
    files: &Files,
    plan: &Plan,
    wrong: Wrong,
    reason: &str,
    (prompt, home): (&str, &str),
) -> Result<String, Box<dyn std::error::Error>> {
    let updates = "cluster.warmpath_feed.*ssl_context_update_by_sds";
    let before = place.stat(updates).await;
    if wrong.make(files)? {
        until("Envoy reads its files again", before + 1, || place.stat(updates)).await?;
    }
    place.kill_sidecar().await;
    place.start_sidecar(plan).await?;
    let line = format!("warmpath_feed_refused_total{{reason=\"{reason}\"}}");
    let counted = until("refused and counted", 1, || place.counted(&line)).await?;
    // It is really cut off: what it knows grows old.
    let stale = async || match place.ask(prompt).await {
        Ok(answer) if answer.reason() == Some("stale_feed") => 1,
        _ => 0,
    };
    until("the feed grows old", 1, stale).await?;
    for request in 0..REQUESTS {
        let answer = place.ask(prompt).await?;
        if !is_home(&answer, home) {
            let engine = answer.engine();
            return Err(format!("request {request}: {engine:?}, not by what is known").into());
        }
    }
    let followers = place.counted("warmpath_feed_followers").await;
    if followers != 0 {
        return Err(format!("{followers} followers").into());
    }
    Ok(format!("refused {counted} times as {reason}; {REQUESTS} requests still go to {home}"))
}

/// A gateway that never got through: requests are served, by load.
async fn never_attached(
    place: &mut Place,
    plan: &Plan,
) -> Result<String, Box<dyn std::error::Error>> {
    let line = "warmpath_feed_refused_total{reason=\"no_token\"}";
    place.stop_envoy().await;
    place.start_envoy(plan).await?;
    let counted = until("refused and counted", 1, || place.counted(line)).await?;
    let mut engines = Vec::new();
    for request in 0..REQUESTS {
        let answer = place.ask(&format!("request {request}")).await?;
        engines.extend(answer.engine().map(str::to_owned));
    }
    engines.sort_unstable();
    engines.dedup();
    let known = (0..ENGINES).map(engine_name).all(|name| engines.contains(&name));
    if !known {
        return Err(format!("only {engines:?} were used").into());
    }
    Ok(format!("refused {counted} times; {REQUESTS} requests are served by {engines:?}"))
}

/// Makes the checks of a Unix socket.
pub(super) async fn check_socket(options: &Options, report: &mut Report) {
    let mut place = match Place::engines(options).await {
        Ok(place) => place,
        Err(error) => return report.failure("the engines start", error),
    };
    match socket(&mut place, options).await {
        Ok(figures) => report.check("a feed over a Unix socket", true, figures),
        Err(error) => report.failure("a feed over a Unix socket", error),
    }
    place.stop().await;
}

async fn socket(
    place: &mut Place,
    options: &Options,
) -> Result<String, Box<dyn std::error::Error>> {
    let cluster = cluster(options, "socket.yaml")?;
    let feed = "listen: \"unix:feed.sock\"".to_owned();
    let plan = Plan { feed, cluster, template: "envoy-body.yaml", ..Plan::default() };
    place.start_sidecar(&plan).await?;
    place.start_envoy(&plan).await?;
    let deadline = CATCH_UP_WITHIN * 6;
    let took = place.until_warm(deadline).await?;
    Ok(format!("warm after {:.1} s", took.as_secs_f64()))
}

fn cluster(options: &Options, name: &str) -> std::io::Result<String> {
    std::fs::read_to_string(options.envoy_config("feed").join(name))
}

/// The cluster with a token, over mutual TLS: as its file says to do it.
fn both(options: &Options) -> Result<String, Box<dyn std::error::Error>> {
    let (mtls, token) = (cluster(options, "mtls.yaml")?, cluster(options, "token.yaml")?);
    let from = mtls.find("    transport_socket:").ok_or("no transport_socket")?;
    let to = mtls.find("    typed_extension_protocol_options:").ok_or("no end of it")?;
    let socket = mtls.get(from..to).unwrap_or_default();
    let place = "    typed_extension_protocol_options:";
    Ok(token.replacen(place, &format!("{socket}{place}"), 1))
}
