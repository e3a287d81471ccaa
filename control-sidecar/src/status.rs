//! Status: what people, probes and Prometheus ask over HTTP.
//!
//! `/healthz` the process answers; `/readyz` it has something to serve and no
//! gap that is not explained; `/metrics`; `/v1/state` everything there is to see.
//! Never a token or a prompt.

use std::collections::BTreeMap;
use std::sync::Arc;

use axum::Router;
use axum::extract::State as Extract;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Json, Response};
use axum::routing::get;
use serde_json::{Value, json};
use tokio::sync::oneshot;
use warmpath_core::card::{Blind, ModelCard};
use warmpath_core::roster::{Parity, Role};
use warmpath_core::settings::{Draft, FIELDS, SelectionPolicy, Settings, Value as Given};

use crate::fleet::RankLoad;
use crate::keeper::{Question, RankReport, Report};
use crate::publish::service::Shared;
use crate::source::View;
use crate::state::counts::Notice;

/// The pages.
pub fn router(shared: Arc<Shared>) -> Router {
    Router::new()
        .route("/healthz", get(|| async { "ok\n" }))
        .route("/readyz", get(ready))
        .route("/metrics", get(metrics))
        .route("/v1/state", get(state))
        .with_state(shared)
}

async fn report(shared: &Shared) -> Option<Report> {
    let (answer, report) = oneshot::channel();
    shared.questions.send(Question::Report(answer)).await.ok()?;
    report.await.ok()
}

fn stopping() -> Response {
    (StatusCode::SERVICE_UNAVAILABLE, Json(json!({"ready": false, "reasons": ["stopping"]})))
        .into_response()
}

async fn ready(Extract(shared): Extract<Arc<Shared>>) -> Response {
    let Some(report) = report(&shared).await else { return stopping() };
    let ready = report.unready.is_empty();
    let status = if ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    (status, Json(json!({"ready": ready, "reasons": report.unready}))).into_response()
}

async fn metrics(Extract(shared): Extract<Arc<Shared>>) -> Response {
    // Levels are set when the state reports.
    if report(&shared).await.is_none() {
        return stopping();
    }
    let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    ([(header::CONTENT_TYPE, kind)], shared.metrics.page()).into_response()
}

async fn state(Extract(shared): Extract<Arc<Shared>>) -> Response {
    let Some(report) = report(&shared).await else { return stopping() };
    let progress = shared.log.progress();
    let named = report.cards.models.iter().filter(|card| !card.name.is_empty());
    let models: Vec<Value> = named.map(|card| model(card, &report)).collect();
    let problems: Vec<Value> = report
        .problems
        .iter()
        .map(|problem| json!({"of": problem.of, "reason": problem.reason}))
        .collect();
    let (own, remote) = (shared.exchange.report().own_by_slot, shared.exchange.remote.by_slot());
    let workers: Vec<Value> = report
        .ranks
        .iter()
        .map(|rank| {
            let index = usize::from(rank.listed.spec.model);
            let name = report.cards.models.get(index).map(|card| &card.name);
            let of_slot = |by_slot: &BTreeMap<u16, u64>| by_slot.get(&rank.slot.0).copied();
            let bookings = [&own, &remote].map(|it| of_slot(it).unwrap_or(0));
            worker(rank, name, bookings)
        })
        .collect();
    Json(json!({
        "epoch": shared.log.epoch(),
        "sequence": progress.last,
        "open": progress.open,
        "ready": report.unready.is_empty(),
        "reasons": report.unready,
        "followers": shared.metrics.followers(),
        "streams": shared.metrics.streams(),
        "lag": {"updates_waiting": report.updates_waiting},
        "workers_list_error": report.list_error,
        "workers": workers,
        "models": models,
        "problems": problems,
        "router": settings(&report),
        "replicas": replicas(&shared),
    }))
    .into_response()
}

/// The settings in force, where those come from that were set, and what
/// differs for models whose workers bring their own.
fn settings(report: &Report) -> Value {
    let own = &report.settings.default;
    let of_models = report.settings.of_models.iter().map(|(number, settings)| {
        let card = report.cards.models.get(usize::from(*number));
        let name = card.map_or_else(|| number.to_string(), |card| card.name.clone());
        let fields = settings_fields(settings).into_iter();
        let own = settings_fields(own);
        let differing = fields.filter(|(field, value)| own.get(field) != Some(value));
        (name, Value::Object(differing.collect()))
    });
    json!({
        "settings": settings_fields(own),
        "from": report.router.origins,
        "of_models": of_models.collect::<serde_json::Map<_, _>>(),
        "warnings": report.router.warnings,
    })
}

fn settings_fields(settings: &Settings) -> serde_json::Map<String, Value> {
    let draft = Draft::of(*settings);
    let mut fields: serde_json::Map<String, Value> = FIELDS
        .iter()
        .map(|field| {
            let value = match draft.get(field) {
                Given::Off => Value::Null,
                Given::Flag(flag) => flag.into(),
                Given::Number(number) => number.into(),
                Given::Word(word) => word.into(),
            };
            (field.name.to_owned(), value)
        })
        .collect();
    let policies = [
        ("worker_selection_thresholds", Some(settings.selection_policy)),
        ("router_prefill_thresholds", settings.prefill_policy),
        ("router_decode_thresholds", settings.decode_policy),
    ];
    for (name, policy) in policies {
        if let Some(SelectionPolicy::TwoTier(tiers)) = policy {
            let thresholds = json!({
                "cache_threshold": tiers.cache_threshold,
                "balance_abs_threshold": tiers.balance_abs_threshold,
                "balance_rel_threshold": tiers.balance_rel_threshold,
            });
            fields.insert(name.to_owned(), thresholds);
        }
    }
    fields
}

fn replicas(shared: &Shared) -> Value {
    let report = shared.exchange.report();
    let publishers: Vec<Value> = report
        .publishers
        .iter()
        .map(|(of, id, address)| json!({"of": of, "publisher": id, "address": address}))
        .collect();
    json!({
        "sync": report.syncs,
        "router": report.router,
        "bookings": {"own": report.levels.own, "remote": report.levels.remote},
        "publishers": publishers,
        "streams": report.streams,
        "problem": report.problem,
    })
}

fn model(card: &ModelCard, report: &Report) -> Value {
    let unready = report.models_unready.iter().find(|(name, _)| *name == card.name);
    let tokenizer = match card.tokenizer {
        Ok(blob) => {
            json!({"state": "ready", "bytes": blob.len, "hash": format!("{:016x}", blob.hash)})
        }
        Err(Blind::Tokenizer) => json!({"state": "blind", "reason": "tokenizer"}),
        Err(Blind::TokenizerKind) => json!({"state": "blind", "reason": "tokenizer_kind"}),
        Err(Blind::Loading) => {
            json!({"state": "loading", "reason": unready.map_or("loading", |(_, reason)| reason)})
        }
    };
    let templates: Vec<&str> = card.templates.iter().map(|it| it.name.as_str()).collect();
    json!({
        "name": card.name,
        "aliases": card.aliases,
        "block_size": card.block_size,
        "context_length": card.context_length,
        "eagle": card.eagle,
        "tokenizer": tokenizer,
        "templates": templates,
    })
}

/// - `bookings`: of our gateways, and of other routers.
fn worker(rank: &RankReport, model: Option<&String>, [own, remote]: [u64; 2]) -> Value {
    let spec = &rank.listed.spec;
    let not_indexed: serde_json::Map<String, Value> = Notice::ALL
        .into_iter()
        .filter(|notice| rank.counts.of(*notice) > 0)
        .map(|notice| (notice.reason().to_owned(), rank.counts.of(notice).into()))
        .collect();
    json!({
        "id": spec.worker.id.0,
        "rank": spec.worker.rank.0,
        "name": rank.listed.name,
        "slot": rank.slot.0,
        "endpoint": spec.endpoint,
        "model": model,
        "role": match spec.role {
            Role::Aggregated => "aggregated",
            Role::Prefill => "prefill",
            Role::Decode => "decode",
        },
        "parity": match rank.parity {
            Parity::Exact => "exact",
            Parity::Unproven => "unproven",
            Parity::Blind => "blind",
        },
        "fenced": rank.is_fenced,
        "blocks": rank.blocks,
        "lower_tiers": lower_tiers(rank),
        "pages": rank.pages,
        "total_kv_blocks": spec.total_kv_blocks,
        "max_num_batched_tokens": spec.max_num_batched_tokens,
        "taints": spec.taints,
        "last_engine_sequence": rank.applied,
        "last_clear": rank.last_loss.map(crate::source::sequence::Loss::reason),
        "not_indexed": not_indexed,
        "source": rank.view.map(|view| source(&view)),
        "load": load(&rank.load),
        "own_bookings": own,
        "remote_bookings": remote,
    })
}

/// Slot and blocks of each lower tier that has stored something.
fn lower_tiers(rank: &RankReport) -> Value {
    let tiers = ["host", "disk", "external"].into_iter().zip(rank.tiers.in_order());
    let shown = tiers.zip(rank.lower_blocks).filter_map(|((name, slot), blocks)| {
        Some((name.to_owned(), json!({"slot": slot?.0, "blocks": blocks})))
    });
    let mut shown: serde_json::Map<String, Value> = shown.collect();
    shown.insert("orphans".to_owned(), rank.orphans.into());
    shown.into()
}

fn load(load: &RankLoad) -> Value {
    json!({
        "kv_used_blocks": load.kv_used_blocks,
        "active_decode_blocks": load.active_decode_blocks,
        "active_prefill_tokens": load.active_prefill_tokens,
        "running": load.running,
        "waiting": load.waiting,
        "cache_usage": load.cache_usage,
        "total_kv_blocks": load.total_kv_blocks,
    })
}

fn source(view: &View) -> Value {
    let standing = view.standing;
    json!({
        "connected": standing.connected,
        "repairing": standing.repairing,
        "synced": standing.synced,
        "partial": standing.partial.map(crate::source::sequence::Loss::reason),
        "messages": view.messages,
        "gaps": view.gaps,
        "duplicates": view.duplicates,
        "failure": view.failure,
    })
}
