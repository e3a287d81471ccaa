//! Every message of every captured publisher, by what it says.

use super::*;

/// One event as a word: `+2` two pages stored, `-1` one removed, `0` cleared;
/// `@` and the medium if not the device, `~` if not of the main attention,
/// `s` salted, `l` with an adapter, `o` with objects, `p` of pairs.
fn word(event: &KvEvent) -> String {
    let place = |medium: Medium, group: Group| {
        let medium = if medium == Medium::Device { String::new() } else { format!("@{medium:?}") };
        let other = if group.kind == Some(GroupKind::Other) { "~" } else { "" };
        format!("{medium}{other}")
    };
    match event {
        KvEvent::Stored(it) => {
            let keys = [
                (it.cache_salt.is_some(), 's'),
                (it.lora.is_some(), 'l'),
                (!it.objects.is_empty(), 'o'),
                (it.pairs, 'p'),
            ];
            let keys: String = keys.iter().filter(|(is, _)| *is).map(|(_, key)| key).collect();
            format!("+{}{}{keys}", it.pages.len(), place(it.medium, it.group))
        }
        KvEvent::Removed(it) => format!("-{}{}", it.pages.len(), place(it.medium, it.group)),
        KvEvent::Hashed(it) => format!("#{}", it.blocks.len()),
        KvEvent::Cleared => "0".to_owned(),
    }
}

fn words(batch: &Batch) -> String {
    let skipped = batch.skipped.iter().map(|skip| format!("!{}", skip.reason()));
    batch.events.iter().map(word).chain(skipped).collect::<Vec<_>>().join(" ")
}

const VLLM: &str = "vllm-0.31.0-zmq-publisher.json";
const SGLANG: &str = "sglang-0.5.21-zmq-publisher.json";

/// Goal: each message of the real publishers is read as what was put into them.
#[test]
fn publishers_say_what_was_put_into_them() {
    const ALL_KINDS: [&str; 7] =
        ["+2", "+1 +1~", "+1slo", "-1", "+1@HostPinned !remote", "-1@HostPinned", "0"];
    let table: [(&str, usize, Option<u32>, &[&str]); 5] = [
        (VLLM, 0, Some(0), &ALL_KINDS),
        (VLLM, 1, Some(2), &["+2", "-1", "0"]),
        (VLLM, 2, Some(1), &ALL_KINDS),
        (SGLANG, 0, Some(0), &["+2", "+1s", "+1@HostPinned", "+1p", "-1", "0"]),
        (SGLANG, 1, Some(3), &["+2", "+1s"]),
    ];
    for (file, case, rank, expected) in table {
        let batches = live(file, case);
        let actual: Vec<String> = batches.iter().map(words).collect();
        assert_eq!(actual, expected, "{file} {case}");
        assert!(batches.iter().all(|batch| batch.rank == rank), "{file} {case}");
    }
}

/// Goal: a replay gives the live messages again, those that the publisher still
/// has, and then its end.
#[test]
fn replays_repeat_the_live_messages() {
    // File, case, live messages, and the first that is still had.
    for (file, case, messages, first) in
        [(VLLM, 0, 7, 0), (VLLM, 1, 3, 0), (VLLM, 2, 7, 5), (SGLANG, 0, 6, 0), (SGLANG, 1, 2, 0)]
    {
        let case = fixture(file)["cases"][case].clone();
        let live = case["live"].as_array().unwrap();
        assert_eq!(live.len(), messages);
        let replay = &case["replay"]["start=0"];
        let replies = replay.get("replies_as_seen_by_DEALER").unwrap_or(replay);
        let (end, replies) = replies.as_array().unwrap().split_last().unwrap();
        assert_eq!(payload(end), b"");
        assert_eq!(replies.len(), messages - first, "{file}");
        for (reply, live) in replies.iter().zip(&live[first..]) {
            assert_eq!(payload(reply), payload(live), "{file}");
        }
    }
}

/// Goal: what SGLang publishes beside its events is not taken for any.
#[test]
fn load_messages_are_no_batches() {
    let sglang = fixture(SGLANG);
    let load = payload(&sglang["load_stat"]["frames"]);
    assert_eq!(decode(Engine::Sglang, &load), Err(DecodeError::NotABatch));
    let passes = sglang["forward_pass_metrics"].as_array().unwrap();
    assert_eq!(passes.len(), 2);
    for frames in passes {
        assert_eq!(decode(Engine::Sglang, &payload(frames)), Err(DecodeError::NotABatch));
    }
}
