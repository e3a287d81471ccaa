//! Pins: workers that a trusted sender names, and hosts that the gateway allows.

use serde_json::{Value, json};

use super::super::client::Response;
use super::super::launch::{Stack, StackError, engine_name, local};
use super::super::limits::ENGINES;
use super::super::report::Report;
use super::apis::{Headers, chat};
use super::variant::Variant;

/// Gives the gateway's subset hint what a header says.
const HINT_BY_HEADER: &str = "          - name: subset_by_header
            typed_config:
              \"@type\": type.googleapis.com/envoy.extensions.filters.http.header_to_metadata.v3.Config
              request_rules:
              - header: x-test-subset
                on_header_present: {metadata_namespace: envoy.lb.subset_hint, key: x-gateway-destination-endpoint-subset, type: STRING}
                remove: true
";

/// The same as a list that never changes.
fn hint_by_list(hosts: &[String]) -> String {
    format!(
        "          - name: subset_by_list
            typed_config:
              \"@type\": type.googleapis.com/envoy.extensions.filters.http.set_metadata.v3.Config
              metadata:
              - metadata_namespace: envoy.lb.subset_hint
                value: {{x-gateway-destination-endpoint-subset: {hosts:?}}}
"
    )
}

/// Makes the checks.
pub(super) async fn check(stack: &Stack, report: &mut Report) {
    if let Err(error) = trusting(stack, report).await {
        report.failure("a gateway that trusts pins starts", error);
    }
    if let Err(error) = listed(stack, report).await {
        report.failure("a gateway with a subset list starts", error);
    }
}

async fn trusting(stack: &Stack, report: &mut Report) -> Result<(), StackError> {
    let options = "\"trust_pins\": true, \"legacy_headers\": true";
    let gateway = Variant::start(stack, "envoy-trusting", HINT_BY_HEADER, options).await?;
    let address = gateway.address();
    pinned(&address, report).await;
    refused(&address, report).await;
    hinted(stack, &gateway, report).await;
    gateway.stop().await;
    Ok(())
}

fn engine(answer: Option<&Response>) -> Option<&str> {
    answer?.header("x-engine-id")
}

/// Every way to name a worker, and every worker.
async fn pinned(gateway: &str, report: &mut Report) {
    let (mut obeyed, mut sent, mut told) = (0, 0, 0);
    let mut first_miss = None;
    for index in 0..ENGINES {
        let id = (index + 1).to_string();
        let number = index + 1;
        let ways: [(Headers<'_>, Value); 6] = [
            (&[("x-dynamo-worker-instance-id", &id)], json!({})),
            (&[("x-worker-instance-id", &id), ("x-dp-rank", "0")], json!({})),
            (&[("x-dynamo-worker-instance-id", &id)], json!({"backend_instance_id": 9})),
            (&[], json!({"backend_instance_id": number})),
            (&[], json!({"decode_worker_id": number, "dp_rank": 0, "backend_instance_id": 9})),
            (
                &[("x-dynamo-worker-instance-id", &id), ("x-dynamo-request-priority", "3")],
                json!({"agent_hints": {"osl": 5}}),
            ),
        ];
        for (headers, nvext) in ways {
            sent += 1;
            let answer = chat(gateway, headers, &nvext).await;
            if engine(answer.as_ref()) == Some(engine_name(index).as_str()) {
                obeyed += 1;
            } else if first_miss.is_none() {
                first_miss =
                    Some(format!("{headers:?} {nvext}: {:?}", answer.as_ref().map(|it| it.status)));
            }
            let expected = format!(
                "x-dynamo-worker-instance-id={id},x-dynamo-dp-rank=0,\
                 x-worker-instance-id={id},x-dp-rank=0"
            );
            told += u32::from(
                answer.is_some_and(|it| it.header("x-engine-told") == Some(expected.as_str())),
            );
        }
    }
    report.check(
        "a trusted sender names its worker, in headers and body",
        obeyed == sent && told == sent,
        format_args!("{obeyed} of {sent} obeyed, {told} told by both names; {first_miss:?}"),
    );
}

/// Headers and `nvext` of a request, and code and parameter of the answer.
type Refused<'a> = (Headers<'a>, Value, &'a str, &'a str);

/// Pins that are none.
async fn refused(gateway: &str, report: &mut Report) {
    let cases: [Refused<'_>; 8] = [
        (
            &[("x-dynamo-worker-instance-id", "99")],
            json!({}),
            "unknown_pin",
            "x-dynamo-worker-instance-id",
        ),
        (
            &[("x-dynamo-worker-instance-id", "1"), ("x-dynamo-dp-rank", "7")],
            json!({}),
            "unknown_pin",
            "x-dynamo-dp-rank",
        ),
        (
            &[("x-dynamo-worker-instance-id", "0x1")],
            json!({}),
            "bad_header",
            "x-dynamo-worker-instance-id",
        ),
        (&[("x-worker-instance-id", "one")], json!({}), "bad_header", "x-worker-instance-id"),
        (&[("x-data-parallel-rank", "-1")], json!({}), "bad_header", "x-data-parallel-rank"),
        (&[], json!({"decode_worker_id": 99}), "unknown_pin", "x-dynamo-worker-instance-id"),
        (&[], json!({"backend_instance_id": "1"}), "bad_field", "nvext.backend_instance_id"),
        (&[], json!({"prefill_dp_rank": 4_294_967_296_u64}), "bad_field", "nvext.prefill_dp_rank"),
    ];
    let mut wrong = Vec::new();
    for (headers, nvext, code, param) in &cases {
        let answer = chat(gateway, headers, nvext).await;
        let error = answer.as_ref().and_then(Response::json).unwrap_or_default();
        let said = |member: &str| error.pointer(&format!("/error/{member}")).cloned();
        let status = answer.map(|answer| answer.status.as_u16());
        let fits = status == Some(400)
            && said("code") == Some(Value::from(*code))
            && said("param") == Some(Value::from(*param))
            && said("message").is_some_and(|it| it.as_str().is_some_and(|it| it.contains(param)));
        if !fits {
            wrong.push(format!("{headers:?} {nvext}: {status:?} {error}"));
        }
    }
    report.check(
        "pins that are none are refused by name",
        wrong.is_empty(),
        format_args!("{} of {} {wrong:?}", cases.len() - wrong.len(), cases.len()),
    );
}

async fn hinted(stack: &Stack, gateway: &Variant, report: &mut Report) {
    let host = |index: usize| {
        stack.ports.engines.get(index).map(|ports| local(ports.http)).unwrap_or_default()
    };
    let address = gateway.address();
    let mut kept = 0;
    for index in 0..ENGINES {
        let hints =
            [host(index), format!("10.9.9.9:1, {}", host(index)), format!("{},x", host(index))];
        for hint in hints {
            let answer = chat(&address, &[("x-test-subset", &hint)], &json!({})).await;
            kept += usize::from(engine(answer.as_ref()) == Some(engine_name(index).as_str()));
        }
    }
    let any = chat(&address, &[("x-test-subset", "127.0.0.1")], &json!({})).await;
    let any = engine(any.as_ref()).is_some();
    report.check(
        "a subset hint narrows the workers",
        kept == 3 * ENGINES && any,
        format_args!("{kept} of {} kept to it, an address alone: {any}", 3 * ENGINES),
    );
    let mut codes = Vec::new();
    for hint in ["10.9.9.9:1", "nonsense", &local(1)] {
        let answer = chat(&address, &[("x-test-subset", hint)], &json!({})).await;
        let error = answer.as_ref().and_then(Response::json).unwrap_or_default();
        let retry = answer.as_ref().and_then(|it| it.number("retry-after"));
        let status = answer.map(|answer| answer.status.as_u16());
        codes.push((status, error.pointer("/error/code").cloned(), retry));
    }
    let expected = (Some(503), Some(Value::from("no_hosts")), Some(1));
    let entries = ENGINES as u64 + 1;
    let malformed = gateway.counter("warmpath_subset_malformed_total", entries).await;
    report.check(
        "a subset hint without any worker: 503",
        codes.iter().all(|code| *code == expected) && malformed == Some(entries),
        format_args!("{codes:?}, {malformed:?} malformed entries counted"),
    );
}

async fn listed(stack: &Stack, report: &mut Report) -> Result<(), StackError> {
    let last = ENGINES - 1;
    let host = stack.ports.engines.get(last).map(|ports| local(ports.http)).unwrap_or_default();
    let front = hint_by_list(&["10.9.9.9:1".to_owned(), host]);
    let gateway = Variant::start(stack, "envoy-subset", &front, "\"trust_pins\": false").await?;
    let mut kept = 0;
    for _ in 0..8 {
        let answer = chat(&gateway.address(), &[], &json!({})).await;
        kept += u32::from(engine(answer.as_ref()) == Some(engine_name(last).as_str()));
    }
    report.check(
        "a subset hint that is a list narrows the workers",
        kept == 8,
        format_args!("{kept} of 8"),
    );
    gateway.stop().await;
    Ok(())
}
