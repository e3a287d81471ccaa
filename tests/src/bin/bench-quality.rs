//! `bench-quality`: routers compared; see `--help`.

use std::io::Write;
use std::path::Path;
use std::process::ExitCode;

use warmpath_tests::engine::model::Model;
use warmpath_tests::quality::bench::{self, Plan};
use warmpath_tests::quality::figures::Figures;
use warmpath_tests::quality::rivals::Rival;
use warmpath_tests::stack::child;
use warmpath_tests::stack::options::Options;
use warmpath_tests::quality::offline;
use warmpath_tests::quality::policies::{Policy, Weights};
use warmpath_tests::quality::trace::{Kind, Trace};

fn offline() {
    let model = Model::load(&Path::new(env!("CARGO_MANIFEST_DIR")).join("models/tiny")).unwrap();
    let load: f64 = std::env::args().nth(1).and_then(|t| t.parse().ok()).unwrap_or(1.0);
    let w = Weights { prefill: 1.0, delay: 1.0, decode: 1.0, others: 1.0, output: 128.0, work: 0.0, queue: 1.0, crowd: 0.0, same: 0.0 };
    let policies = [
        ("round-robin", Policy::RoundRobin),
        ("least-requests", Policy::LeastRequests),
        ("dynamo", Policy::Dynamo { prefill_scale: 1.0 }),
        ("dynamo x10", Policy::Dynamo { prefill_scale: 10.0 }),
        ("sglang", Policy::Text { threshold: 0.3, apart: 64, times: 1.5 }),
        ("text always", Policy::Text { threshold: 0.3, apart: 100000, times: 1.5 }),
        ("time", Policy::Time(w)),
        ("time nodelay", Policy::Time(Weights { delay: 0.0, ..w })),
        ("time delay.3", Policy::Time(Weights { delay: 0.3, ..w })),
        ("time delay3", Policy::Time(Weights { delay: 3.0, ..w })),
        ("time work5", Policy::Time(Weights { work: 5.0, ..w })),
        ("time work10 ndel", Policy::Time(Weights { work: 10.0, delay: 0.0, ..w })),
        ("time nodecode", Policy::Time(Weights { decode: 0.0, others: 0.0, ..w })),
        ("time half decode", Policy::Time(Weights { decode: 0.5, others: 0.5, ..w })),
        ("time 2 queue", Policy::Time(Weights { queue: 2.0, ..w })),
    ];
    let specs: Vec<String> = std::env::args().skip(3).collect();
    let mut all: Vec<(String, Policy)> = Vec::new();
    for spec in &specs {
        if let Some((name, policy)) = policies.iter().find(|(name, _)| *name == spec.as_str()) {
            all.push(((*name).to_owned(), *policy));
            continue;
        }
        let n: Vec<f64> = spec.split(',').map(|t| t.parse().unwrap()).collect();
        all.push((spec.clone(), Policy::Time(Weights { prefill: n[0], delay: n[1], decode: n[2], others: n[3], output: n[4], work: n[5], queue: n[6], crowd: n[7], same: n[8] })));
    }
    let mut out = std::io::stdout();
    let kinds = std::env::args().nth(2).unwrap_or_default();
    for kind in Kind::ALL {
        if !kinds.contains(&kind.name()[..4]) { continue; }
        let trace = Trace::new(kind, &model, 1, load).unwrap();
        writeln!(out, "\n{} {} requests {} tokens {} s {} blocks\n{:<28}{}", kind.name(), trace.requests.len(), trace.prompt_tokens(), trace.span_us() / 1_000_000, trace.engine_blocks, "", Figures::HEADING).unwrap();
        for (name, policy) in &all {
            let figures = offline::run(&trace, &model, 4, *policy);
            writeln!(out, "{name:<28}{}", figures.row()).unwrap();
        }
    }
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    if std::env::args().nth(1).as_deref() != Some("live") {
        offline();
        return ExitCode::SUCCESS;
    }
    let variable = |name: &str| std::env::var(name).ok();
    let options = Options::parse(["fleet", "--model-dir", "tests/models/tiny"].map(str::to_owned)).unwrap();
    let model = Model::load(&options.model_dir).unwrap();
    let named = |list: Option<String>, name: &str| list.is_none_or(|list| list.split(',').any(|word| word == name));
    let plan = Plan {
        kinds: Kind::ALL.into_iter().filter(|kind| named(variable("QUALITY_TRACES"), kind.name())).collect(),
        rivals: Rival::ALL.into_iter().filter(|rival| named(variable("QUALITY_ROUTERS"), rival.name())).collect(),
        seed: 1,
        load: variable("QUALITY_LOAD").and_then(|t| t.parse().ok()).unwrap_or(1.0),
        speedup: variable("QUALITY_SPEEDUP").and_then(|t| t.parse().ok()).unwrap_or(4),
        results: options.root.join("target/bench/quality.json"),
    };
    let status = bench::run(&plan, &options, &model).await;
    child::reap().await;
    status
}
