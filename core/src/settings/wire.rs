//! Wire: the body of a settings frame.
//!
//! ```text
//! settings of the default
//! count, then a model's number (2) and its settings, ascending
//!
//! settings: the fields in the order of the type; a number 8 (IEEE 754 bits or
//! whole), a yes or no 1, a case 1, what may be absent 1 and then itself
//! ```

use super::{
    AffinityMode, ApproximateCachePolicy, BusyThresholds, ConditionalDisagg,
    ConditionalDisaggPolicy, QueueLimits, RouterSettings, SelectionPolicy, SessionAffinity,
    Settings, TwoTier,
};
use crate::limits::CARD_MODELS_MAX;
use crate::score::expected_time::ExpectedTime;
use crate::wire::{Reader, WireError, Writer};

impl RouterSettings {
    /// Encodes the body of a settings frame.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut writer = Writer::new();
        write_settings(&mut writer, &self.default);
        writer.count(self.of_models.len());
        for (model, settings) in &self.of_models {
            writer.u16(*model);
            write_settings(&mut writer, settings);
        }
        writer.into_bytes()
    }

    /// Decodes the body of a settings frame.
    ///
    /// # Errors
    ///
    /// A [`WireError`]; the caller keeps the settings it has.
    pub fn decode(body: &[u8]) -> Result<Self, WireError> {
        let mut reader = Reader::new(body);
        let default = read_settings(&mut reader)?;
        let count = reader.count(CARD_MODELS_MAX, 2)?;
        let mut of_models: Vec<(u16, Settings)> = Vec::with_capacity(count);
        for _ in 0..count {
            let model = reader.u16()?;
            if of_models.last().is_some_and(|(before, _)| *before >= model) {
                return Err(WireError::OutOfRange);
            }
            of_models.push((model, read_settings(&mut reader)?));
        }
        reader.finish()?;
        Ok(Self { default, of_models })
    }
}

fn write_settings(writer: &mut Writer, settings: &Settings) {
    // Taken apart so that a field that is added is not forgotten.
    let Settings {
        selection_policy,
        prefill_policy,
        decode_policy,
        overlap_score_credit,
        overlap_score_credit_decay,
        prefill_load_scale,
        decode_active_request_weight,
        host_cache_hit_weight,
        disk_cache_hit_weight,
        shared_cache_multiplier,
        router_temperature,
        use_kv_events,
        router_approximate_cache_policy,
        router_ttl_ms,
        router_predicted_ttl_ms,
        router_replica_sync,
        router_track_active_blocks,
        router_track_output_blocks,
        router_assume_kv_reuse,
        router_track_prefill_tokens,
        router_queue_threshold,
        queue_limits,
        conditional_disagg,
        enforce_disagg,
        session_affinity,
        busy_thresholds,
        active_request_expiry_ms,
        overload_status,
    } = *settings;
    write_policy(writer, selection_policy);
    write_option(writer, prefill_policy, write_policy);
    write_option(writer, decode_policy, write_policy);
    for number in [
        overlap_score_credit,
        overlap_score_credit_decay,
        prefill_load_scale,
        decode_active_request_weight,
        host_cache_hit_weight,
        disk_cache_hit_weight,
        shared_cache_multiplier,
        router_temperature,
    ] {
        write_number(writer, number);
    }
    write_flag(writer, use_kv_events);
    writer.u8(router_approximate_cache_policy as u8);
    writer.u64(router_ttl_ms);
    write_option(writer, router_predicted_ttl_ms, Writer::u64);
    for flag in [
        router_replica_sync,
        router_track_active_blocks,
        router_track_output_blocks,
        router_assume_kv_reuse,
        router_track_prefill_tokens,
    ] {
        write_flag(writer, flag);
    }
    write_option(writer, router_queue_threshold, write_number);
    write_option(writer, queue_limits.requests_per_worker, Writer::u64);
    write_option(writer, queue_limits.tokens_per_worker, Writer::u64);
    write_option(writer, conditional_disagg, write_disagg);
    write_flag(writer, enforce_disagg);
    write_option(writer, session_affinity, write_affinity);
    write_option(writer, busy_thresholds.active_decode_blocks, write_number);
    write_option(writer, busy_thresholds.active_prefill_tokens, Writer::u64);
    write_option(writer, busy_thresholds.active_prefill_tokens_frac, write_number);
    write_option(writer, busy_thresholds.busy, write_number);
    writer.u64(active_request_expiry_ms);
    writer.u16(overload_status);
}

/// The fields are read in the order in which they stand here.
fn read_settings(reader: &mut Reader<'_>) -> Result<Settings, WireError> {
    let settings = Settings {
        selection_policy: read_policy(reader)?,
        prefill_policy: read_option(reader, read_policy)?,
        decode_policy: read_option(reader, read_policy)?,
        overlap_score_credit: read_number(reader)?,
        overlap_score_credit_decay: read_number(reader)?,
        prefill_load_scale: read_number(reader)?,
        decode_active_request_weight: read_number(reader)?,
        host_cache_hit_weight: read_number(reader)?,
        disk_cache_hit_weight: read_number(reader)?,
        shared_cache_multiplier: read_number(reader)?,
        router_temperature: read_number(reader)?,
        use_kv_events: read_flag(reader)?,
        router_approximate_cache_policy: match reader.u8()? {
            0 => ApproximateCachePolicy::Ttl,
            1 => ApproximateCachePolicy::Lru,
            _ => return Err(WireError::UnknownCase),
        },
        router_ttl_ms: reader.u64()?,
        router_predicted_ttl_ms: read_option(reader, Reader::u64)?,
        router_replica_sync: read_flag(reader)?,
        router_track_active_blocks: read_flag(reader)?,
        router_track_output_blocks: read_flag(reader)?,
        router_assume_kv_reuse: read_flag(reader)?,
        router_track_prefill_tokens: read_flag(reader)?,
        router_queue_threshold: read_option(reader, read_number)?,
        queue_limits: QueueLimits {
            requests_per_worker: read_option(reader, Reader::u64)?,
            tokens_per_worker: read_option(reader, Reader::u64)?,
        },
        conditional_disagg: read_option(reader, read_disagg)?,
        enforce_disagg: read_flag(reader)?,
        session_affinity: read_option(reader, read_affinity)?,
        busy_thresholds: BusyThresholds {
            active_decode_blocks: read_option(reader, read_number)?,
            active_prefill_tokens: read_option(reader, Reader::u64)?,
            active_prefill_tokens_frac: read_option(reader, read_number)?,
            busy: read_option(reader, read_number)?,
        },
        active_request_expiry_ms: reader.u64()?,
        overload_status: reader.u16()?,
    };
    settings.validate().map_err(|_| WireError::OutOfRange)?;
    Ok(settings)
}

fn write_flag(writer: &mut Writer, flag: bool) {
    writer.u8(u8::from(flag));
}

fn read_flag(reader: &mut Reader<'_>) -> Result<bool, WireError> {
    match reader.u8()? {
        0 => Ok(false),
        1 => Ok(true),
        _ => Err(WireError::UnknownCase),
    }
}

fn write_number(writer: &mut Writer, number: f64) {
    writer.u64(number.to_bits());
}

fn read_number(reader: &mut Reader<'_>) -> Result<f64, WireError> {
    reader.u64().map(f64::from_bits)
}

fn write_option<T>(writer: &mut Writer, value: Option<T>, write: impl FnOnce(&mut Writer, T)) {
    write_flag(writer, value.is_some());
    if let Some(value) = value {
        write(writer, value);
    }
}

fn read_option<'a, T>(
    reader: &mut Reader<'a>,
    read: impl FnOnce(&mut Reader<'a>) -> Result<T, WireError>,
) -> Result<Option<T>, WireError> {
    if read_flag(reader)? { read(reader).map(Some) } else { Ok(None) }
}

fn write_policy(writer: &mut Writer, policy: SelectionPolicy) {
    match policy {
        SelectionPolicy::DynamoDefault => writer.u8(0),
        SelectionPolicy::TwoTier(thresholds) => {
            writer.u8(1);
            write_number(writer, thresholds.cache_threshold);
            writer.u64(thresholds.balance_abs_threshold);
            write_number(writer, thresholds.balance_rel_threshold);
        }
        SelectionPolicy::ExpectedTime(parameters) => {
            writer.u8(2);
            write_number(writer, parameters.prefill_us);
            write_number(writer, parameters.request_us);
            write_number(writer, parameters.context_us);
            write_number(writer, parameters.output_tokens);
            write_number(writer, parameters.answer_weight);
            write_number(writer, parameters.followers);
            write_number(writer, parameters.followers_per_waiting);
        }
    }
}

fn read_policy(reader: &mut Reader<'_>) -> Result<SelectionPolicy, WireError> {
    match reader.u8()? {
        0 => Ok(SelectionPolicy::DynamoDefault),
        1 => Ok(SelectionPolicy::TwoTier(TwoTier {
            cache_threshold: read_number(reader)?,
            balance_abs_threshold: reader.u64()?,
            balance_rel_threshold: read_number(reader)?,
        })),
        2 => Ok(SelectionPolicy::ExpectedTime(ExpectedTime {
            prefill_us: read_number(reader)?,
            request_us: read_number(reader)?,
            context_us: read_number(reader)?,
            output_tokens: read_number(reader)?,
            answer_weight: read_number(reader)?,
            followers: read_number(reader)?,
            followers_per_waiting: read_number(reader)?,
        })),
        _ => Err(WireError::UnknownCase),
    }
}

fn write_disagg(writer: &mut Writer, disagg: ConditionalDisagg) {
    writer.u8(disagg.policy as u8);
    writer.u32(disagg.eff_isl_threshold);
    write_number(writer, disagg.eff_isl_ratio_threshold);
    write_option(writer, disagg.prefill_busy_threshold, write_number);
    write_option(writer, disagg.decode_busy_threshold, write_number);
}

fn read_disagg(reader: &mut Reader<'_>) -> Result<ConditionalDisagg, WireError> {
    Ok(ConditionalDisagg {
        policy: match reader.u8()? {
            0 => ConditionalDisaggPolicy::IslBounding,
            1 => ConditionalDisaggPolicy::PrefillLoad,
            2 => ConditionalDisaggPolicy::IslOrLoad,
            _ => return Err(WireError::UnknownCase),
        },
        eff_isl_threshold: reader.u32()?,
        eff_isl_ratio_threshold: read_number(reader)?,
        prefill_busy_threshold: read_option(reader, read_number)?,
        decode_busy_threshold: read_option(reader, read_number)?,
    })
}

fn write_affinity(writer: &mut Writer, affinity: SessionAffinity) {
    writer.u64(affinity.ttl_ms);
    writer.u8(affinity.mode as u8);
}

fn read_affinity(reader: &mut Reader<'_>) -> Result<SessionAffinity, WireError> {
    Ok(SessionAffinity {
        ttl_ms: reader.u64()?,
        mode: match reader.u8()? {
            0 => AffinityMode::Hard,
            1 => AffinityMode::Soft,
            _ => return Err(WireError::UnknownCase),
        },
    })
}
