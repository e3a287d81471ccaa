use super::*;
#[cfg(target_arch = "wasm32")]
use wasm_bindgen_test::wasm_bindgen_test as test;

fn booking(id: u64, slot: u16, prefill_tokens: u32, blocks: &[u64]) -> Booking {
    Booking {
        prefill_tokens,
        blocks: hashes(blocks),
        ..Booking::new(BookingId(id), WorkerSlot(slot), id)
    }
}

fn hashes(blocks: &[u64]) -> Vec<SequenceHash> {
    blocks.iter().map(|n| SequenceHash(*n)).collect()
}

fn active_blocks(loads: &Loads, slot: WorkerSlot, prompt: &[SequenceHash]) -> u32 {
    loads.active_blocks(prompt).of(slot, &mut 0)
}

fn sharers(loads: &Loads, slot: WorkerSlot, prompt: &[SequenceHash]) -> u64 {
    loads.sharers(slot, prompt, active_blocks(loads, slot, prompt))
}

#[test]
fn a_shared_prefix_counts_once() {
    let mut loads = Loads::new();
    loads.add(booking(1, 0, 100, &[1, 2, 3]));
    loads.add(booking(2, 0, 20, &[1, 2, 9]));
    let load = WorkerLoad { prefill_tokens: 120, active_blocks: 4, requests: 2 };
    assert_eq!(loads.of(WorkerSlot(0)), load);
    assert_eq!(loads.additional_blocks(WorkerSlot(0), &hashes(&[1, 2, 7, 8])), 2);
    assert_eq!(loads.additional_blocks(WorkerSlot(1), &hashes(&[1, 2, 7, 8])), 4);
    assert_eq!(sharers(&loads, WorkerSlot(0), &hashes(&[1, 2, 7, 8])), 2);
    assert_eq!(sharers(&loads, WorkerSlot(0), &hashes(&[1, 2, 3, 8])), 1);
    assert_eq!(sharers(&loads, WorkerSlot(0), &hashes(&[7])), 0);
    assert_eq!(sharers(&loads, WorkerSlot(1), &hashes(&[1])), 0);
    loads.free(BookingId(1));
    let load = WorkerLoad { prefill_tokens: 20, active_blocks: 3, requests: 1 };
    assert_eq!(loads.of(WorkerSlot(0)), load);
}

#[test]
fn unshared_blocks_count_for_each_booking() {
    let mut loads = Loads::new();
    let unshared = |id| Booking { unshared_blocks: 5, ..booking(id, 0, 0, &[]) };
    loads.add(unshared(1));
    loads.add(unshared(2));
    loads.add(booking(3, 0, 0, &[1]));
    assert_eq!(loads.of(WorkerSlot(0)).active_blocks, 11);
    assert_eq!(loads.additional_blocks(WorkerSlot(0), &hashes(&[1, 2])), 1);
    loads.prefill_done(BookingId(1));
    assert_eq!(loads.of(WorkerSlot(0)).active_blocks, 11);
    loads.free(BookingId(1));
    assert_eq!(loads.of(WorkerSlot(0)).active_blocks, 6);
}

#[test]
fn each_step_happens_once() {
    let mut loads = Loads::new();
    loads.add(booking(1, 0, 100, &[1]));
    loads.add(booking(1, 0, 100, &[1]));
    assert_eq!(loads.refused(), 1);
    loads.add(booking(2, 0, 50, &[]));
    for _ in 0..2 {
        loads.prefill_done(BookingId(1));
        assert_eq!(loads.of(WorkerSlot(0)).prefill_tokens, 50);
    }
    for _ in 0..2 {
        loads.free(BookingId(1));
        assert_eq!(loads.of(WorkerSlot(0)).requests, 1);
    }
    loads.prefill_done(BookingId(9));
    loads.free(BookingId(9));
    loads.free(BookingId(2));
    assert_eq!(loads.of(WorkerSlot(0)), WorkerLoad::default());
}

#[test]
fn what_is_not_refreshed_expires() {
    let mut loads = Loads::new();
    loads.add(booking(10, 0, 1, &[1]));
    loads.add(booking(20, 0, 1, &[2]));
    loads.refresh(BookingId(10), 500);
    loads.refresh(BookingId(99), 500);
    assert_eq!(loads.expire(319, 300), 0);
    assert_eq!(loads.expire(320, 300), 1);
    assert_eq!((loads.bookings(), loads.expired()), (1, 1));
    assert_eq!(loads.expire(800, 300), 1);
    assert_eq!(loads.of(WorkerSlot(0)), WorkerLoad::default());
}

#[test]
fn a_clock_that_jumps_back_expires_nothing() {
    let mut loads = Loads::new();
    loads.add(booking(1_000_000, 0, 1, &[]));
    assert_eq!(loads.expire(5, 300), 0);
}

#[test]
fn a_worker_that_is_gone_takes_its_bookings_along() {
    let mut loads = Loads::new();
    loads.add(booking(1, 0, 1, &[1]));
    loads.add(booking(2, 1, 1, &[1]));
    loads.drop_worker(WorkerSlot(0));
    assert_eq!(loads.bookings(), 1);
    assert_eq!(loads.of(WorkerSlot(1)).requests, 1);
}

#[test]
fn blocks_of_the_answer_count_without_an_expected_length() {
    let mut loads = Loads::new();
    loads.add(booking(1, 0, 0, &[1, 2]));
    loads.output_blocks(BookingId(1), 1, 9);
    loads.output_blocks(BookingId(1), 3, 40);
    assert_eq!(loads.of(WorkerSlot(0)).active_blocks, 5);
    // Fewer than before, as entries may come twice, or of nobody's.
    loads.output_blocks(BookingId(1), 2, 30);
    loads.output_blocks(BookingId(9), 2, 30);
    assert_eq!(loads.of(WorkerSlot(0)).active_blocks, 5);
    loads.output_blocks(BookingId(1), u32::MAX, u32::MAX);
    let most = 2 + u64::from(crate::limits::BOOKING_OUTPUT_BLOCKS_MAX);
    assert_eq!(loads.of(WorkerSlot(0)).active_blocks, most);
    loads.free(BookingId(1));
    assert_eq!(loads.weight(WorkerSlot(0)), 0.0);
}

/// Of 1 2 3, where another booking holds 1 2 4, only 3 loses weight.
#[test]
fn what_is_held_alone_loses_weight_with_the_answer() {
    let mut loads = Loads::new();
    let expecting =
        |id, blocks| Booking { expected_output_tokens: 100, ..booking(id, 0, 0, blocks) };
    loads.add(expecting(1, &[1, 2, 3]));
    loads.add(booking(2, 0, 0, &[1, 2, 4]));
    loads.output_blocks(BookingId(1), 1, 50);
    assert_eq!(loads.weight(WorkerSlot(0)), 4.0);
    loads.output_blocks(BookingId(1), 2, 75);
    assert_eq!(loads.weight(WorkerSlot(0)), 3.0 + 3.0 * 0.25);
    assert_eq!(loads.of(WorkerSlot(0)).active_blocks, 4);
    // Another booking joins: the weight stays.
    loads.add(booking(3, 0, 0, &[1, 2, 3, 5]));
    assert_eq!(loads.weight(WorkerSlot(0)), 4.0 + 3.0 * 0.25);
    // Now 3 is shared, and keeps what it has.
    loads.output_blocks(BookingId(1), 3, 100);
    assert_eq!(loads.weight(WorkerSlot(0)), 4.0 + 0.25);
    loads.output_blocks(BookingId(1), 4, 500);
    assert_eq!(loads.weight(WorkerSlot(0)), 4.0 + 0.25);
    loads.free(BookingId(3));
    loads.free(BookingId(2));
    loads.output_blocks(BookingId(1), 5, 500);
    assert_eq!(loads.weight(WorkerSlot(0)), 0.0);
    assert_eq!(loads.additional_blocks(WorkerSlot(0), &hashes(&[1, 2, 3, 5])), 1);
    loads.free(BookingId(1));
    assert_eq!(loads.of(WorkerSlot(0)), WorkerLoad::default());
}

/// Blocks are cut apart where prompts part; each part keeps its weight.
#[test]
fn a_shorter_prompt_shares_the_weight_of_a_longer_one() {
    let mut loads = Loads::new();
    loads.add(Booking { expected_output_tokens: 4, ..booking(1, 0, 0, &[1, 2, 3, 4]) });
    loads.output_blocks(BookingId(1), 1, 2);
    loads.add(booking(2, 0, 0, &[1, 2]));
    assert_eq!(loads.weight(WorkerSlot(0)), 2.5);
    loads.free(BookingId(1));
    assert_eq!(loads.weight(WorkerSlot(0)), 1.0);
    loads.add(booking(3, 0, 0, &[1, 2, 9]));
    assert_eq!(loads.weight(WorkerSlot(0)), 2.0);
}

#[test]
fn unshared_blocks_lose_weight_too() {
    let mut loads = Loads::new();
    let unshared_blocks = 6;
    let expected_output_tokens = 10;
    let one = booking(1, 0, 0, &[1, 2]);
    loads.add(Booking { unshared_blocks, expected_output_tokens, ..one });
    loads.add(booking(2, 0, 0, &[1, 2]));
    loads.output_blocks(BookingId(1), 1, 5);
    assert_eq!(loads.weight(WorkerSlot(0)), 2.0 + 7.0 * 0.5);
    loads.free(BookingId(1));
    assert_eq!(loads.weight(WorkerSlot(0)), 2.0);
}

/// Hashes that collide must not confuse the count, whoever goes first.
#[test]
fn blocks_with_colliding_hashes_count_for_themselves() {
    for order in [[1, 2, 3, 4], [4, 3, 2, 1], [2, 1, 4, 3], [3, 1, 2, 4]] {
        let mut loads = Loads::new();
        loads.add(booking(1, 0, 0, &[1, 2, 3]));
        loads.add(booking(2, 0, 0, &[9, 2, 3, 3]));
        assert_eq!(loads.of(WorkerSlot(0)).active_blocks, 7);
        loads.add(booking(3, 0, 0, &[9, 2, 8]));
        assert_eq!(loads.of(WorkerSlot(0)).active_blocks, 8);
        loads.add(booking(4, 0, 0, &[2, 1]));
        assert_eq!(loads.of(WorkerSlot(0)).active_blocks, 10);
        for id in order {
            loads.free(BookingId(id));
        }
        assert_eq!(loads.of(WorkerSlot(0)), WorkerLoad::default());
    }
}

/// Prompts of every length that ended have cut a longer one at every block.
#[test]
fn a_prompt_that_was_cut_everywhere_leaves_nothing() {
    let blocks: Vec<u64> = (1..=500).collect();
    let mut loads = Loads::new();
    loads.add(booking(0, 0, 0, &blocks));
    loads.add(booking(1, 1, 0, &blocks));
    for len in 1..500 {
        loads.add(booking(2, 0, 0, &blocks[..len]));
        loads.free(BookingId(2));
    }
    let of = |loads: &Loads, slot| active_blocks(loads, WorkerSlot(slot), &hashes(&blocks));
    assert_eq!((of(&loads, 0), of(&loads, 1)), (500, 500));
    loads.free(BookingId(0));
    assert_eq!((of(&loads, 0), of(&loads, 1)), (0, 500));
    assert_eq!(loads.of(WorkerSlot(0)), WorkerLoad::default());
    loads.free(BookingId(1));
    assert_eq!((of(&loads, 1), loads.of(WorkerSlot(1))), (0, WorkerLoad::default()));
}

#[test]
fn beyond_the_limit_of_hashes_blocks_are_not_shared() {
    let mut loads = Loads::new();
    loads.hashes = BOOKED_BLOCKS_MAX - 3;
    loads.add(booking(1, 0, 0, &[0, 1, 2]));
    loads.add(booking(2, 0, 0, &[0]));
    assert_eq!((loads.of(WorkerSlot(0)).active_blocks, loads.crowded()), (4, 1));
    loads.free(BookingId(2));
    loads.free(BookingId(1));
    loads.add(booking(3, 0, 0, &[0, 1, 2]));
    assert_eq!((loads.additional_blocks(WorkerSlot(0), &hashes(&[0])), loads.crowded()), (0, 1));
}

/// A count too simple to be wrong: each block with its holders and weight.
#[cfg(not(target_arch = "wasm32"))]
#[derive(Default)]
struct Recount {
    bookings: std::collections::BTreeMap<u64, (Booking, bool, u32, f64)>,
    /// Holders and weight by worker and block.
    blocks: std::collections::BTreeMap<(u16, u64), (u32, f64)>,
}

#[cfg(not(target_arch = "wasm32"))]
impl Recount {
    /// Blocks without a hash are numbered beyond all that have one.
    fn keys(booking: &Booking) -> Vec<(u16, u64)> {
        let own = (0..u64::from(booking.unshared_blocks)).map(|n| (booking.id.0 + 1) << 32 | n);
        let blocks = booking.blocks.iter().map(|hash| hash.0).chain(own);
        blocks.map(|block| (booking.slot.0, block)).collect()
    }

    fn add(&mut self, booking: &Booking) {
        if self.bookings.contains_key(&booking.id.0) {
            return;
        }
        for key in Self::keys(booking) {
            self.blocks.entry(key).or_insert((0, 1.0)).0 += 1;
        }
        self.bookings.insert(booking.id.0, (booking.clone(), false, 0, 1.0));
    }

    fn output(&mut self, id: u64, blocks: u32, tokens: u32) {
        let Some((booking, _, outputs, weight)) = self.bookings.get_mut(&id) else { return };
        if blocks <= *outputs {
            return;
        }
        *outputs = blocks;
        if let Some(now) = booking.weight(tokens) {
            *weight = now;
            for key in Self::keys(booking) {
                let (holders, weight) = self.blocks.get_mut(&key).unwrap();
                if *holders == 1 {
                    *weight = now;
                }
            }
        }
    }

    fn free(&mut self, id: u64) {
        let Some((booking, ..)) = self.bookings.remove(&id) else { return };
        for key in Self::keys(&booking) {
            self.blocks.get_mut(&key).unwrap().0 -= 1;
        }
        self.blocks.retain(|_, (holders, _)| *holders > 0);
    }

    fn drop_worker(&mut self, slot: u16) {
        self.blocks.retain(|key, _| key.0 != slot);
        self.bookings.retain(|_, (booking, ..)| booking.slot.0 != slot);
    }

    fn of(&self, slot: u16) -> (u64, u64, f64) {
        let here = || self.bookings.values().filter(|(booking, ..)| booking.slot.0 == slot);
        let outputs: f64 = here().map(|it| f64::from(it.2) * it.3).sum();
        let prompts: f64 =
            self.blocks.iter().filter(|(key, _)| key.0 == slot).map(|(_, it)| it.1).sum();
        let prefill = here().filter(|it| !it.1).map(|it| u64::from(it.0.prefill_tokens)).sum();
        (prefill, here().count() as u64, prompts + outputs)
    }
}

#[cfg(not(target_arch = "wasm32"))]
proptest::proptest! {
    /// Goal: whatever happens in whatever order, loads equal a recount of
    /// the bookings that are left, and end at zero.
    #[test]
    fn loads_equal_a_recount(steps in proptest::collection::vec((0_u8..8, 0_u64..12, 0_u16..3, 0_u64..6, 0_u64..3), 0..200)) {
        let mut loads = Loads::new();
        let mut recount = Recount::default();
        for (what, id, slot, len, branch) in steps {
            let number = u32::try_from(len).unwrap();
            match what {
                0..3 => {
                    // Three trunks; a block's number says what is before it.
                    let blocks: Vec<u64> =
                        (0..len).map(|at| if at < 2 { at } else { at + 100 * branch }).collect();
                    let booking = Booking {
                        unshared_blocks: u32::from(what == 2),
                        expected_output_tokens: u32::from(what > 0) * 40,
                        ..booking(id, slot, 7, &blocks)
                    };
                    loads.add(booking.clone());
                    recount.add(&booking);
                }
                3 => {
                    loads.prefill_done(BookingId(id));
                    if let Some(entry) = recount.bookings.get_mut(&id) {
                        entry.1 = true;
                    }
                }
                4..6 => {
                    loads.output_blocks(BookingId(id), number, number * 10);
                    recount.output(id, number, number * 10);
                }
                6 => {
                    loads.free(BookingId(id));
                    recount.free(id);
                }
                _ => {
                    loads.drop_worker(WorkerSlot(slot));
                    recount.drop_worker(slot);
                }
            }
            for slot in 0..3 {
                let load = loads.of(WorkerSlot(slot));
                let (prefill, requests, weight) = recount.of(slot);
                proptest::prop_assert_eq!((load.prefill_tokens, load.requests), (prefill, requests));
                let own = loads.weight(WorkerSlot(slot));
                proptest::prop_assert!((own - weight).abs() < 1e-9, "{own} {weight}");
                proptest::prop_assert_eq!(load.active_blocks, rounded(own));
                let is_held = |block: &u64| recount.blocks.contains_key(&(slot, *block));
                let query = [0, 1, 102, 103, 104];
                let active = query.iter().take_while(|block| is_held(block)).count() as u64;
                let additional = loads.additional_blocks(WorkerSlot(slot), &hashes(&query));
                proptest::prop_assert_eq!(additional, 5 - active);
                // Asked for all workers at once.
                let at_once = active_blocks(&loads, WorkerSlot(slot), &hashes(&query));
                proptest::prop_assert_eq!(u64::from(at_once), active);
            }
        }
        for id in 0..12 {
            loads.free(BookingId(id));
        }
        proptest::prop_assert_eq!((loads.slots.len(), loads.hashes), (0, 0));
        proptest::prop_assert_eq!(loads.active.counts(), [0, 0]);
    }

    /// Goal: blocks whose numbers say nothing about what is before them, as
    /// if all hashes collided, leave nothing behind.
    #[test]
    fn nothing_is_left_of_colliding_hashes(steps in proptest::collection::vec((0_u64..6, proptest::collection::vec(0_u64..8, 0..6)), 0..100)) {
        let mut loads = Loads::new();
        loads.add(booking(99, 0, 0, &[]));
        for (id, blocks) in steps {
            loads.free(BookingId(id));
            loads.add(Booking { expected_output_tokens: 9, ..booking(id, 0, 0, &blocks) });
            loads.output_blocks(BookingId(id), 1, u32::try_from(blocks.len()).unwrap());
            let load = &loads.slots[&WorkerSlot(0)].blocks;
            // Six bookings of five blocks.
            proptest::prop_assert!(load.edges() <= 30 && load.weight() > -1e-9);
            let [nodes, keys] = loads.active.counts();
            proptest::prop_assert!(nodes <= 30 && keys == nodes);
        }
        for id in 0..6 {
            loads.free(BookingId(id));
        }
        let load = &loads.slots[&WorkerSlot(0)].blocks;
        proptest::prop_assert_eq!((load.edges(), load.weight()), (0, 0.0));
        proptest::prop_assert_eq!(loads.active.counts(), [0, 0]);
    }
}
