//! The module's allocator: small blocks from free lists, the rest from the standard
//! library's own.
//!
//! A rendering makes and drops some dozens of small values for each message. The
//! standard allocator looks for the best place of each, and joins what is freed
//! with its neighbours; here both are the exchange of a list's head. What was
//! handed out as small blocks stays theirs, so memory holds as many of each size
//! as there were at once.
//!
//! The host's buffers come from here as well, and are freed by their exact length.

#![expect(unsafe_code, reason = "an allocator hands out raw memory")]

use core::alloc::{GlobalAlloc, Layout};
use core::cell::Cell;
use core::ptr;
use std::alloc::System;

/// Sizes are rounded up to a multiple of this, in bytes. It is also the alignment of
/// all small blocks.
const GRAIN: usize = 16;

/// Largest small block, in bytes. Values, their entries and short texts are below.
const SMALL_BYTES_MAX: usize = 512;

/// Small blocks are cut from chunks of about this size, in bytes.
const CHUNK_BYTES: usize = 4096;

/// Free lists of small blocks by size.
pub(crate) struct SmallBlocks {
    /// The first free block of `GRAIN * index` bytes; each begins with the address of
    /// the next. Null ends a list. The first list is of no use.
    heads: [Cell<*mut u8>; SMALL_BYTES_MAX / GRAIN + 1],
}

#[cfg(target_feature = "atomics")]
compile_error!("the allocator's lists are not for several threads");

// SAFETY: the target has one thread.
#[cfg(target_arch = "wasm32")]
unsafe impl Sync for SmallBlocks {}

#[cfg(target_arch = "wasm32")]
#[global_allocator]
static ALLOCATOR: SmallBlocks = SmallBlocks::new();

impl SmallBlocks {
    /// Without any block.
    pub(crate) const fn new() -> Self {
        SmallBlocks { heads: [const { Cell::new(ptr::null_mut()) }; SMALL_BYTES_MAX / GRAIN + 1] }
    }

    /// The list for a layout; `None` if it is not small.
    fn head(&self, layout: Layout) -> Option<&Cell<*mut u8>> {
        if layout.align() > GRAIN {
            return None;
        }
        self.heads.get(layout.size().div_ceil(GRAIN))
    }
}

/// Cuts a chunk into blocks for an empty list, and returns one more; null if there
/// is no memory.
#[cold]
fn refill(head: &Cell<*mut u8>, layout: Layout) -> *mut u8 {
    let size = layout.size().next_multiple_of(GRAIN).max(GRAIN);
    let count = CHUNK_BYTES / size;
    let Ok(chunk) = Layout::from_size_align(size * count, GRAIN) else { return ptr::null_mut() };
    // SAFETY: a chunk has several blocks, so its size is not zero.
    let first = unsafe { System.alloc(chunk) };
    if first.is_null() {
        return first;
    }
    for index in 1..count {
        // SAFETY: the block is within the chunk, which is nobody's yet.
        unsafe {
            let block = first.add(index * size);
            link(block, head.get());
            head.set(block);
        }
    }
    first
}

/// Writes into a free block which one is next.
///
/// # Safety
///
/// `block` is a small block that is in nobody's use.
#[expect(clippy::cast_ptr_alignment, reason = "blocks are aligned to 16 bytes")]
unsafe fn link(block: *mut u8, next: *mut u8) {
    // SAFETY: it has room for an address, and is aligned for one.
    unsafe { block.cast::<*mut u8>().write(next) };
}

/// Reads which free block is behind one.
///
/// # Safety
///
/// `block` is in a list of free blocks.
#[expect(clippy::cast_ptr_alignment, reason = "blocks are aligned to 16 bytes")]
unsafe fn next(block: *mut u8) -> *mut u8 {
    // SAFETY: `link` has written it.
    unsafe { block.cast::<*mut u8>().read() }
}

// SAFETY: a block is in a list or in use, never both: `alloc` takes it out and
// `dealloc`, which gets the same layout, puts it back. Blocks of a list are of its
// size, aligned to `GRAIN`, and do not overlap. Nothing here panics.
unsafe impl GlobalAlloc for SmallBlocks {
    // Not inlined: at hundreds of places it would be 25 KB of code.
    #[inline(never)]
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let Some(head) = self.head(layout) else {
            // SAFETY: the caller's promise is what the system asks for.
            return unsafe { System.alloc(layout) };
        };
        let block = head.get();
        if block.is_null() {
            return refill(head, layout);
        }
        // SAFETY: it is the first of its list.
        head.set(unsafe { next(block) });
        block
    }

    #[inline(never)]
    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        let Some(head) = self.head(layout) else {
            // SAFETY: `alloc` got it from the system, for the same layout.
            return unsafe { System.dealloc(block, layout) };
        };
        // SAFETY: `alloc` took it from this list, and the caller gives it up.
        unsafe { link(block, head.get()) };
        head.set(block);
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        if self.head(layout).is_none() {
            // The system knows which memory is new, and zero by itself.
            // SAFETY: the caller's promise is what the system asks for.
            return unsafe { System.alloc_zeroed(layout) };
        }
        // SAFETY: the caller's promise; the block has at least that size.
        unsafe {
            let block = self.alloc(layout);
            if !block.is_null() {
                block.write_bytes(0, layout.size());
            }
            block
        }
    }

    unsafe fn realloc(&self, block: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // SAFETY: the caller promises that the size can be rounded up to the alignment.
        let wanted = unsafe { Layout::from_size_align_unchecked(size, layout.align()) };
        match (self.head(layout), self.head(wanted)) {
            // SAFETY: the system's block, for the same layout, and the caller's promise.
            (None, None) => unsafe { System.realloc(block, layout, size) },
            // It has that room already.
            (Some(old), Some(new)) if ptr::eq(old, new) => block,
            // SAFETY: both are blocks of their own, at least as long as what is copied;
            // the old one is given up once it is not needed.
            _ => unsafe {
                let moved = self.alloc(wanted);
                if !moved.is_null() {
                    ptr::copy_nonoverlapping(block, moved, layout.size().min(size));
                    self.dealloc(block, layout);
                }
                moved
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use warmpath_core::choose::Random;

    struct Held {
        block: *mut u8,
        layout: Layout,
        mark: u8,
    }

    fn any_layout(random: &mut Random) -> Layout {
        let align = 1 << random.below(7);
        layout(random, align)
    }

    fn layout(random: &mut Random, align: usize) -> Layout {
        // Every small size and the first beyond, and now and then a large one.
        let bound = if random.below(8) == 0 { 20_000 } else { 600 };
        Layout::from_size_align(1 + random.below(bound) as usize, align).unwrap()
    }

    fn fill(held: &Held) {
        unsafe { held.block.write_bytes(held.mark, held.layout.size()) };
    }

    fn check(held: &Held, bytes: usize) {
        let content = unsafe { core::slice::from_raw_parts(held.block, bytes) };
        assert!(content.iter().all(|&byte| byte == held.mark), "{:?} was overwritten", held.layout);
        assert!(held.block.addr().is_multiple_of(held.layout.align()), "{:?}", held.layout);
    }

    /// Goal: a block is its owner's alone, whatever is allocated, moved and freed.
    /// Method: many blocks of all sizes and alignments are full of their owner's mark,
    /// and still are when they are moved or freed.
    #[test]
    fn blocks_keep_what_is_in_them() {
        let (blocks, random) = (SmallBlocks::new(), &mut Random::seeded(7));
        let mut all: Vec<Held> = Vec::new();
        for round in 0..200_000_u32 {
            let [mark, ..] = round.to_le_bytes();
            let count = u32::try_from(all.len()).unwrap();
            match random.below(if count < 2_000 { 4 } else { 3 }) {
                0 if count > 0 => {
                    let held = all.swap_remove(random.below(count) as usize);
                    check(&held, held.layout.size());
                    unsafe { blocks.dealloc(held.block, held.layout) };
                }
                1 if count > 0 => {
                    let held = &mut all[random.below(count) as usize];
                    let wanted = layout(random, held.layout.align());
                    let kept = wanted.size().min(held.layout.size());
                    held.block = unsafe { blocks.realloc(held.block, held.layout, wanted.size()) };
                    held.layout = wanted;
                    check(held, kept);
                    fill(held);
                }
                2 => {
                    let layout = any_layout(random);
                    let held =
                        Held { block: unsafe { blocks.alloc_zeroed(layout) }, layout, mark: 0 };
                    check(&held, layout.size());
                    all.push(Held { mark, ..held });
                    all.last().iter().for_each(|held| fill(held));
                }
                _ => {
                    let layout = any_layout(random);
                    let held = Held { block: unsafe { blocks.alloc(layout) }, layout, mark };
                    fill(&held);
                    all.push(held);
                }
            }
        }
        assert!(all.len() > 500, "too few blocks were held at once: {}", all.len());
        for held in all {
            check(&held, held.layout.size());
            unsafe { blocks.dealloc(held.block, held.layout) };
        }
    }

    /// Goal: what is freed is what is handed out next, so memory does not grow.
    #[test]
    fn freed_blocks_are_used_again() {
        let blocks = SmallBlocks::new();
        let sized = |bytes| Layout::from_size_align(bytes, 8).unwrap();
        for bytes in 1..=SMALL_BYTES_MAX {
            unsafe {
                let first = blocks.alloc(sized(bytes));
                blocks.dealloc(first, sized(bytes));
                let again = blocks.alloc(sized(bytes.next_multiple_of(GRAIN)));
                assert_eq!(again, first, "{bytes}");
                blocks.dealloc(again, sized(bytes.next_multiple_of(GRAIN)));
            }
        }
    }
}
