//! Whatever a driver writes into a packed ring, the device says what is wrong, stops, and works again after a reset.

use std::sync::Arc;

use pyvirtio_core::RingConfig;

use crate::driver::{Closure, BUFFERS, DESC, END, INDIRECT, NEXT, SIZE, TABLE, WRITE};
use crate::packed_driver::{PackedDriver, Part, AVAILABLE, IS_USED};

const CHAIN: &str = "requestq: chain at 0: ";
const TOO_MANY: &str = "requestq: more descriptors available or in flight than the ring has (8)";

/// The driver writes `set_up`; the device must break for `reason`, write nothing, and recover.
fn refuses(set_up: impl FnOnce(&mut PackedDriver), reason: &str) {
    let mut driver = PackedDriver::new();
    driver.start_completing();
    set_up(&mut driver);
    let ring = |driver: &PackedDriver| {
        let mut bytes = [0; 16 * SIZE as usize];
        driver.memory.read(DESC, &mut bytes).unwrap();
        bytes
    };
    let before = ring(&driver);
    driver.vq.service();
    assert_eq!(driver.broken(), reason);
    assert_eq!(driver.config_vector.irqfd.take(), 1);
    driver.vq.notify();
    assert!(driver.vq.pop().is_none());
    assert!(ring(&driver) == before);
    driver.reset();
    driver.add(1);
    driver.vq.notify();
    assert_eq!((driver.used(), driver.state.broken()), (vec![(1, 0)], None));
}

fn refuses_chain(parts: &[Part], reason: &str) {
    refuses(|driver| driver.chain(parts, 0), &format!("{CHAIN}{reason}"));
}

#[test]
fn a_buffer_id_past_the_ring() {
    for id in [SIZE, 0x7fff, u16::MAX] {
        let reason = format!("{CHAIN}buffer id {id} is past the ring (8 entries)");
        refuses(|driver| driver.add(id), &reason);
    }
}

#[test]
fn only_the_last_buffer_id_counts() {
    let driver = PackedDriver::new();
    driver.raw(1, (BUFFERS, 1, WRITE | AVAILABLE), 2);
    driver.raw(0, (BUFFERS, 1, NEXT | AVAILABLE), u16::MAX);
    assert_eq!(driver.pop().map(|mut chain| (chain.head(), chain.complete())), Some((2, Ok(()))));
}

#[test]
fn a_chain_longer_than_the_ring() {
    refuses(
        |driver| (0..SIZE).for_each(|index| driver.raw(index, (BUFFERS, 1, NEXT | AVAILABLE), 0)),
        &format!("{CHAIN}the chain is longer than the ring (8 entries)"),
    );
}

#[test]
fn a_chain_whose_tail_is_not_available() {
    refuses(
        |driver| driver.raw(0, (BUFFERS, 1, NEXT | AVAILABLE), 0),
        &format!("{CHAIN}descriptor 1 is not available (flags 0x0)"),
    );
    refuses(
        |driver| {
            driver.raw(1, (BUFFERS, 1, WRITE | AVAILABLE | IS_USED), 0);
            driver.raw(0, (BUFFERS, 1, NEXT | AVAILABLE), 0);
        },
        &format!("{CHAIN}descriptor 1 is not available (flags 0x8082)"),
    );
}

#[test]
fn flags_that_make_nothing_available_are_not_looked_at_twice() {
    for flags in [0, IS_USED, IS_USED | AVAILABLE, !AVAILABLE, !0] {
        let driver = PackedDriver::new();
        driver.start(|_| panic!("called"));
        (0..SIZE).for_each(|index| driver.raw(index, (BUFFERS, 1, flags), 0));
        driver.vq.notify();
        assert_eq!(driver.broken(), "");
    }
}

#[test]
fn a_whole_lap_too_many_is_no_livelock() {
    // CVE-2026-16457: what is in flight is made available again, so that there is news for ever and nothing to take.
    let mut driver = PackedDriver::new();
    driver.start(|vq| while vq.pop().map(std::mem::forget).is_some() {});
    (0..SIZE).for_each(|id| driver.add(id));
    driver.vq.notify();
    assert_eq!((driver.vq.in_flight(), driver.broken().as_str()), (SIZE, ""));
    driver.raw(0, (BUFFERS, 1, IS_USED), 0);
    driver.vq.notify();
    assert_eq!(driver.broken(), TOO_MANY);
}

#[test]
fn a_handler_that_takes_nothing_from_an_overfull_ring_is_no_livelock() {
    let mut driver = PackedDriver::new();
    driver.start(|_| ());
    (0..SIZE).for_each(|id| driver.add(id));
    driver.vq.notify();
    driver.raw(0, (BUFFERS, 1, IS_USED), 0);
    driver.vq.notify();
    assert_eq!(driver.broken(), TOO_MANY);
}

#[test]
fn a_descriptor_that_is_withdrawn_is_not_taken() {
    let mut driver = PackedDriver::new();
    let memory = driver.memory.clone();
    driver.start(move |vq| {
        memory.write(DESC + 14, &[0, 0]).unwrap();
        assert!(vq.pop().is_none());
    });
    driver.add(0);
    driver.vq.notify();
    assert_eq!(driver.broken(), format!("{CHAIN}descriptor 0 is not available (flags 0x0)"));
}

#[test]
fn a_chain_over_what_is_in_flight() {
    let mut driver = PackedDriver::new();
    driver.start(|vq| while vq.pop().map(std::mem::forget).is_some() {});
    (0..6).for_each(|id| driver.add(id));
    driver.vq.notify();
    driver.chain(&[(BUFFERS, 1, 0); 3], 6);
    driver.vq.notify();
    assert_eq!(driver.broken(), TOO_MANY);
}

#[test]
fn a_descriptor_of_all_ones() {
    refuses(
        |driver| driver.raw(0, (u64::MAX, u32::MAX, !IS_USED), u16::MAX),
        &format!("{CHAIN}descriptor 0: an indirect table with a next descriptor"),
    );
}

#[test]
fn a_buffer_outside_ram() {
    for (address, length) in [(END - 1, 2), (END, 1), (u64::MAX - 1, 4), (1 << 40, u32::MAX)] {
        let reason = format!("descriptor 0: {length} bytes at {address:#x} are not guest memory");
        refuses_chain(&[(address, length, WRITE)], &reason);
    }
}

#[test]
fn a_readable_buffer_after_a_writable_one() {
    let reason = "descriptor 1: a device-readable buffer after a device-writable one";
    refuses_chain(&[(BUFFERS, 1, WRITE), (BUFFERS, 1, 0)], reason);
}

#[test]
fn tables_that_are_none() {
    let refuses_table = |length, flags, reason: &str| {
        refuses_chain(&[(TABLE, length, INDIRECT | flags)], &format!("descriptor 0: an indirect table {reason}"));
    };
    refuses_table(16, NEXT, "with a next descriptor");
    refuses_table(0, 0, "of 0 bytes (a multiple of 16)");
    refuses_table(24, 0, "of 24 bytes (a multiple of 16)");
    refuses_table(9 * 16, 0, "of 9 entries (at most 8)");
    refuses_chain(
        &[(END - 16, 32, INDIRECT)],
        &format!("descriptor 0: 32 bytes at {:#x} are not guest memory", END - 16),
    );
}

#[test]
fn a_table_behind_other_descriptors() {
    let reason = "descriptor 1: an indirect table behind other descriptors";
    refuses_chain(&[(BUFFERS, 1, 0), (TABLE, 16, INDIRECT)], reason);
}

#[test]
fn what_may_not_stand_in_a_table() {
    refuses(
        |driver| {
            driver.desc_in(TABLE, 0, TABLE, 16, 0, INDIRECT);
            driver.chain(&[(TABLE, 32, INDIRECT)], 0);
        },
        &format!("{CHAIN}descriptor 0: indirect descriptor 0: a table inside a table"),
    );
    refuses(
        |driver| {
            driver.desc_in(TABLE, 1, END, 1, 0, WRITE);
            driver.chain(&[(TABLE, 32, INDIRECT)], 0);
        },
        &format!("{CHAIN}descriptor 0: indirect descriptor 1: 1 bytes at {END:#x} are not guest memory"),
    );
}

#[test]
fn a_table_without_the_feature() {
    let mut driver = PackedDriver::with(|config| config.indirect = false);
    driver.start_completing();
    driver.chain(&[(TABLE, 16, INDIRECT)], 0);
    driver.vq.notify();
    let reason = "descriptor 0: an indirect table without VIRTIO_F_INDIRECT_DESC";
    assert_eq!(driver.broken(), format!("{CHAIN}{reason}"));
}

#[test]
fn one_id_twice_is_served_twice() {
    let mut driver = PackedDriver::new();
    driver.start_completing();
    driver.add(0);
    driver.add(0);
    driver.vq.notify();
    assert_eq!(driver.used(), [(0, 0), (0, 0)]);
}

#[test]
fn scribbled_used_descriptors_change_nothing() {
    let mut driver = PackedDriver::new();
    driver.start_completing();
    driver.add(0);
    driver.vq.notify();
    driver.raw(0, (u64::MAX, 0, 0), 9);
    driver.add(1);
    driver.vq.notify();
    assert_eq!(driver.flags(1), AVAILABLE | IS_USED);
}

#[test]
fn rings_that_cannot_be_are_refused() {
    type Spoil = fn(&mut RingConfig);
    let cases: [(Spoil, &str); 9] = [
        (|c| c.size = 0, "0 entries (1 or more up to 256)"),
        (|c| c.size = 257, "257 entries (1 or more up to 256)"),
        (|c| c.desc += 8, "the descriptor ring at 0x1008 is not a multiple of 16"),
        (|c| c.avail += 2, "the driver event suppression at 0x2002 is not a multiple of 4"),
        (|c| c.used += 2, "the device event suppression at 0x3002 is not a multiple of 4"),
        (
            |c| c.used = c.avail,
            "the driver event suppression at 0x2000 and the device event suppression at 0x2000 overlap",
        ),
        (|c| c.used = END, "4 bytes at 0x200000 are not guest memory"),
        (|c| c.next_avail = 8, "index 8 is past the ring (8 entries)"),
        (|c| c.next_used = 0xffff, "index 32767 is past the ring (8 entries)"),
    ];
    for (spoil, reason) in cases {
        let driver = PackedDriver::with(spoil);
        let handler = Arc::new(Closure(|_: &_| ()));
        let error = driver.vq.start(driver.memory.clone(), &driver.config, handler).unwrap_err();
        assert_eq!(error.0, format!("requestq: {reason}"));
    }
}
