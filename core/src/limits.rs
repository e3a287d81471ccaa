//! Every upper bound of the core, with its unit and its reason.
//!
//! A bound is reached in production some day; whoever enforces one counts it
//! under a reason (see `reason`), so that reaching it is seen.

// --- request ---------------------------------------------------------------

/// Longest body that is parsed, in bytes. Above it the request is routed by
/// load. 16 MiB is Envoy's default HTTP/2 stream window, beyond which a body
/// could not be buffered anyway.
pub const BODY_BYTES_MAX: usize = 16 * 1024 * 1024;

/// Deepest nesting of arrays and objects that is scanned, in levels.
pub const JSON_DEPTH_MAX: usize = 128;

/// Longest name of a field that is looked for, in bytes. A longer key is read
/// over without resolving its escapes.
pub const NAME_BYTES_MAX: usize = 64;

/// Most members called `nvext` in one body. The last one counts; the others are
/// noted because `handover` removes them.
pub const NVEXT_MEMBERS_MAX: usize = 8;

/// Most prompts in one completion request. Engines take each as a request of
/// its own, so thousands in one body are no real client's.
pub const PROMPT_BATCH_MAX: usize = 4_096;

// --- demands ---------------------------------------------------------------

/// Most taints in one list of a request's constraints. A fleet tells its workers
/// apart by a handful.
pub const TAINTS_MAX: usize = 64;

/// Longest name of a session, in bytes, as in Dynamo.
pub const SESSION_ID_BYTES_MAX: usize = 256;

/// Most metadata headers of one request, as in Dynamo.
pub const METADATA_ENTRIES_MAX: usize = 64;

/// Most bytes of their keys and values together, as in Dynamo.
pub const METADATA_BYTES_MAX: usize = 64 * 1024;

/// Most hosts of a subset hint that are looked at: those of the largest cluster
/// with a name for each rank. The others count as malformed.
pub const SUBSET_HOSTS_MAX: usize = ROSTER_WORKERS_MAX;

// --- render ----------------------------------------------------------------

/// Longest chat template that is compiled, in bytes. The longest in use take
/// about 30 KB.
pub const TEMPLATE_BYTES_MAX: usize = 512 * 1024;

/// Most named templates of one model.
pub const TEMPLATES_MAX: usize = 16;

/// Most special tokens of one model that a template sees by name.
pub const SPECIAL_TOKENS_MAX: usize = 64;

/// What one rendering may cost, in the template engine's fuel: an instruction
/// is one, and so are 64 bytes that are produced or copied. A thousand messages
/// take about half a million; all of it takes some 0.1 s.
pub const TEMPLATE_FUEL_MAX: u64 = 4_000_000;

/// Most JSON values of one request that are made into values of a template. Each
/// takes about a hundred bytes of memory and as little as two of the body, and a
/// VM that runs out of memory takes every stream of its thread with it. A
/// thousand messages and a hundred tools take about thirty thousand.
pub const TEMPLATE_VALUES_MAX: usize = 262_144;

/// Longest rendered prompt, in bytes. A template repeats little of a body, so
/// this is the longest body twice.
pub const RENDERED_BYTES_MAX: usize = 2 * BODY_BYTES_MAX;

// --- usage -----------------------------------------------------------------

/// Longest end of a response, or of one event in it, that is kept to find
/// `usage` in, in bytes. The object itself takes a few hundred.
pub const RESPONSE_TAIL_BYTES_MAX: usize = 64 * 1024;

/// Most keys `usage` that are tried in one event or response, from its end. An
/// engine writes one.
pub const USAGE_KEYS_MAX: usize = 8;

// --- hash ------------------------------------------------------------------

/// Most blocks of one prompt that are hashed and looked up, in blocks. At 16
/// tokens a block this is a prompt of 2 M tokens.
pub const PROMPT_BLOCKS_MAX: usize = 131_072;

// --- feed ------------------------------------------------------------------

/// Longest frame body, in bytes. A roster of [`ROSTER_WORKERS_MAX`] workers and
/// the cards of a gateway fit; deltas and parts are far smaller.
pub const FRAME_BODY_BYTES_MAX: usize = 1024 * 1024;

/// Most operations in one delta or snapshot part. Applying one takes about
/// 0.1 ms, which is what a worker thread may spend at a time on the feed.
pub const DELTA_OPERATIONS_MAX: usize = 2_000;

/// Longest part of a blob, in bytes: copying one takes about 20 µs.
pub const BLOB_PART_BYTES_MAX: usize = 64 * 1024;

/// Most blocks a snapshot may announce.
pub const SNAPSHOT_BLOCKS_MAX: u64 = 1 << 32;

/// Time between two heartbeats of the sidecar, in milliseconds.
pub const HEARTBEAT_MS: u64 = 200;

/// Silence of the sidecar after which it is not known any more how full workers'
/// caches are, in milliseconds. It says so every two seconds at least.
pub const CACHE_USAGE_STALE_MS: u64 = 10_000;

/// Most workers (instances × ranks) in a roster. Slots are 16-bit, a worker can
/// take four of them, and as many must be free for new incarnations.
pub const ROSTER_WORKERS_MAX: usize = 8_192;

/// Most slots that one worker takes: its own, and one for each lower tier.
pub const WORKER_SLOTS_MAX: usize = 4;

/// Longest endpoint in bytes: an IPv6 address with scope and port takes 58.
pub const ENDPOINT_BYTES_MAX: usize = 64;

/// Longest taint of a worker, in bytes.
pub const TAINT_BYTES_MAX: usize = 256;

/// Most taints of one worker.
pub const WORKER_TAINTS_MAX: usize = 64;

/// Most different taints of all workers of a roster.
pub const TAINT_WORDS_MAX: usize = 4_096;

/// Most taints of all workers of a roster together: 64 KiB of a frame, four a
/// worker in the largest roster.
pub const ROSTER_TAINTS_MAX: usize = 32_768;

/// Most LoRA adapters in a roster. An engine keeps tens of them, a fleet with
/// thousands loads them by need.
pub const ADAPTERS_MAX: usize = 4_096;

/// Longest name of an adapter, in bytes.
pub const ADAPTER_NAME_BYTES_MAX: usize = 512;

/// Most holders of all adapters of a roster together: 128 KiB of a frame.
pub const ADAPTER_HOLDERS_MAX: usize = 65_536;

/// Most models behind one gateway, free numbers between them included.
pub const CARD_MODELS_MAX: usize = 64;

/// Longest name of a model, template or special token, in bytes.
pub const CARD_NAME_BYTES_MAX: usize = 1024;

/// Most aliases of a model, and most special tokens that templates name.
pub const CARD_ALIASES_MAX: usize = 256;

/// Most named templates of a model.
pub const CARD_TEMPLATES_MAX: usize = 16;

/// Most tokens put before a completion prompt.
pub const CARD_PREFIX_TOKENS_MAX: usize = 16;

/// Longest tokenizer file, in bytes. The largest in use are 12 MB compiled,
/// 33 MB as JSON.
pub const TOKENIZER_BYTES_MAX: u64 = 64 * 1024 * 1024;

// --- events ----------------------------------------------------------------

/// Most blocks in one engine event: those of the longest prompt that is hashed.
pub const EVENT_BLOCKS_MAX: usize = PROMPT_BLOCKS_MAX;

/// Most tokens in one engine event. 4 Mi tokens are twice the longest prompt.
pub const EVENT_TOKENS_MAX: usize = 4 * 1024 * 1024;

/// Most events in one engine batch. An engine sends one batch a step; the
/// largest seen hold a few thousand removals.
pub const BATCH_EVENTS_MAX: usize = 65_536;

/// Longest name inside an event (adapter, salt, object), in bytes.
pub const EVENT_NAME_BYTES_MAX: usize = 1024;

const _: () = {
    // The relations that the limits above rely on.
    assert!(DELTA_OPERATIONS_MAX * 16 <= FRAME_BODY_BYTES_MAX);
    assert!(BLOB_PART_BYTES_MAX + 64 <= FRAME_BODY_BYTES_MAX);
    assert!(BOOKING_ENTRY_BYTES_MAX + BOOKINGS_FRAME_BYTES <= FRAME_BODY_BYTES_MAX);
    assert!(ROSTER_TAINTS_MAX * 2 <= FRAME_BODY_BYTES_MAX);
    assert!(WORKER_TAINTS_MAX <= u8::MAX as usize && TAINT_WORDS_MAX <= u16::MAX as usize);
    assert!(ADAPTER_HOLDERS_MAX * 2 <= FRAME_BODY_BYTES_MAX);
    assert!(ROSTER_WORKERS_MAX * WORKER_SLOTS_MAX <= 1 << 15);
};

// --- load ------------------------------------------------------------------

/// Most bookings of one gateway process at a time.
pub const BOOKINGS_MAX: usize = 65_536;

/// Most block hashes that a booking carries through the ring log. The blocks
/// of a longer prompt beyond it count towards no worker's active blocks; at 16
/// tokens a block that is a prompt of 128 k tokens.
pub const BOOKING_BLOCKS_MAX: usize = 8_192;

/// Most sessions that are bound to a worker at a time (Dynamo's bound). Each takes
/// about 50 bytes in each VM.
pub const SESSIONS_MAX: usize = 65_536;

/// Most blocks of own decisions that stand for caches, over all workers. Each
/// takes about 80 bytes in each VM.
pub const APPROXIMATE_RECORDS_MAX: usize = 1_000_000;

/// Steps in which such records end, in milliseconds (Dynamo's).
pub const APPROXIMATE_TICK_MS: u64 = 100;

/// Most block hashes of all bookings together, about 70 MB in each VM and 100 bytes
/// wherever prompts part. The blocks of a booking beyond it are not shared with others.
pub const BOOKED_BLOCKS_MAX: usize = 4 * 1024 * 1024;

/// Most blocks of one answer that are booked; those beyond it do not count. At 16
/// tokens a block that is an answer of 1 M tokens.
pub const BOOKING_OUTPUT_BLOCKS_MAX: u32 = 65_536;
/// Longest ring entry about a booking, in bytes: two bookings of the most blocks
/// ([`BOOKING_BLOCKS_MAX`]), and some.
pub const BOOKING_ENTRY_BYTES_MAX: usize = 2 * (BOOKING_BLOCKS_MAX * 8 + 1024);

/// Bytes of entries from which a frame of bookings is sent: copying one through
/// shared data takes about 0.1 ms. A single longer entry makes a longer frame.
pub const BOOKINGS_FRAME_BYTES: usize = 64 * 1024;

/// Most entries of one frame of bookings. Applying one takes below 0.1 ms.
pub const BOOKINGS_FRAME_ENTRIES_MAX: usize = 1_024;

/// Most bookings of other routers at a time: half of what a gateway process
/// holds, so that its own always have room.
pub const REMOTE_BOOKINGS_MAX: usize = BOOKINGS_MAX / 2;

/// Ends of remote bookings that a filter remembers: a list that was made before
/// the end, but comes behind it, must not bring the booking back.
pub const REMOTE_ENDS_KEPT: usize = 4_096;

// --- shared data -----------------------------------------------------------

/// Slots of the ring log. A booking takes three entries, so at 1000 requests a
/// second a VM may be more than a second behind before it must start over.
pub const RING_SLOTS: u64 = 4_096;

/// How often an append tries again when other VMs are faster.
pub const RING_APPEND_ATTEMPTS_MAX: u32 = 64;

/// Places for tokenizer files in shared data: one for each model that a
/// gateway may serve with a tokenizer of its own, and some to change over.
pub const SHELF_PLACES: u32 = 16;

// --- replica ---------------------------------------------------------------

/// Most bytes of deltas that are kept while a snapshot comes in: ten seconds of
/// 400 000 block events each.
pub const PENDING_BYTES_MAX: usize = 32 * 1024 * 1024;

/// Bytes of such deltas that one step applies: about 0.8 ms.
pub const PENDING_BYTES_PER_STEP: usize = 64 * 1024;

/// Places of the index that one step makes for a snapshot: a quarter of a megabyte
/// of new memory that has to be zeroed, below 1 ms. For 10 M blocks that takes 400
/// ticks.
pub const SNAPSHOT_PLACES_PER_STEP: usize = 32 * 1024;

/// Tables of the index that one step sweeps: at 10 M blocks about 0.3 ms.
pub const SWEEP_TABLES_PER_STEP: usize = 2;
// --- tokenize --------------------------------------------------------------

/// Longest text of one prompt that is encoded, in bytes. A rendered prompt is
/// a body plus what the template adds.
pub const TOKENIZE_TEXT_BYTES_MAX: usize = BODY_BYTES_MAX + 1024 * 1024;

/// Most tokens of one prompt: what [`PROMPT_BLOCKS_MAX`] blocks of 16 hold.
pub const TOKENIZE_TOKENS_MAX: usize = PROMPT_BLOCKS_MAX * 16;

/// Longest single pre-token that is merged, in bytes. Merging one cannot be
/// interrupted and costs 0.1 to 0.4 us a byte, so this is about 3 ms.
pub const PRETOKEN_BYTES_MAX: usize = 16 * 1024;

/// Most places of a stretch whose normal form differs that are noted. Behind them
/// there are no borders, so nothing of the stretch is cached.
pub const NORMAL_FORM_CHANGES_MAX: usize = 16 * 1024;

/// Most work for one prompt, in steps per byte of text: a step is one byte
/// looked at by the pre-tokenizer or the added-token matcher. Ordinary text
/// takes 1 to 2; only a pattern that looks far ahead again and again reaches
/// this, and without the bound it would be quadratic.
pub const TOKENIZE_STEPS_PER_BYTE_MAX: u64 = 64;

/// Longest tokenizer file that is loaded, in bytes. The largest public ones
/// compile to 13 MB; the JSON form of the same is 34 MB.
pub const TOKENIZER_FILE_BYTES_MAX: usize = 64 * 1024 * 1024;

/// Token ids and merge ranks are below this: a merge is one `u64` of a left
/// id, a right id and a rank of 20 bits each.
pub const TOKEN_IDS_MAX: u32 = 1 << 20;

/// Longest added token, in bytes: the most that one look of the matcher reads.
pub const ADDED_TOKEN_BYTES_MAX: usize = 1024;

/// Words of several tokens that are short (at most 16 bytes and 7 ids) and
/// remembered, in entries of 48 bytes: 768 KiB.
pub const WORD_CACHE_SHORT_ENTRIES: usize = 16 * 1024;

/// Words that are longer (at most 94 bytes and 24 ids) and remembered, in
/// entries of 192 bytes: 768 KiB.
pub const WORD_CACHE_LONG_ENTRIES: usize = 4 * 1024;

/// Least text of a chunk that the prefix cache remembers, in bytes, and the part
/// of it by which it is found. The next turn tokenizes the last such stretch
/// again, which takes about 20 us; a chunk takes about 200 bytes besides its text
/// and tokens.
pub const PREFIX_CHUNK_BYTES: usize = 1024;

/// Most text behind a chunk that may have a say in its tokens, in bytes: a border
/// that depends on more is passed over. Mostly it is one character.
pub const PREFIX_LOOK_AHEAD_MAX: usize = 1024;

/// Largest chunk that is remembered, in bytes of memory. Text without a border for
/// that long is no conversation.
pub const PREFIX_NODE_BYTES_MAX: usize = 128 * 1024;

/// Most chunks that are found by the same window. They differ behind it, in a
/// word or so, unless somebody makes them collide.
pub const PREFIX_COLLISIONS_MAX: usize = 8;

/// Most chunks that are forgotten to remember one. They are all about as large,
/// so one is the rule.
pub const PREFIX_EVICTIONS_MAX: usize = 64;

/// Longest text that the `hf-tokenizers` engine encodes, in bytes. It cannot
/// stop half way, and takes about 0.3 us a byte.
pub const HF_TEXT_BYTES_MAX: usize = 256 * 1024;

const _: () = assert!(PRETOKEN_BYTES_MAX < TOKENIZE_TEXT_BYTES_MAX);
const _: () = assert!(TOKENIZER_FILE_BYTES_MAX < u32::MAX as usize);

/// Longest name of a header in a configuration, in bytes.
pub const HEADER_NAME_BYTES_MAX: usize = 256;

/// Entries of bookings that wait to be sent to the sidecar. Beyond it they are
/// dropped, and a list of all that run takes their place.
pub const OUTBOX_ENTRIES_MAX: usize = 8_192;

/// Bytes of such entries.
pub const OUTBOX_BYTES_MAX: usize = 4 * 1024 * 1024;

/// Frames of them that are sent at a time, of at most about 64 KiB each: copying one
/// takes some 20 µs.
pub const OUTBOX_FRAMES: usize = 4;
