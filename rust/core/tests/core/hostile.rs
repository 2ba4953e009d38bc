//! Whatever a driver writes, the device says what is wrong, stops, and works again after a reset.

use pyvirtio_core::RingConfig;

use crate::driver::{Closure, Driver, AVAIL, BUFFERS, DESC, END, INDIRECT, NEXT, SIZE, TABLE, USED, WRITE};

/// The driver makes head 0 available after `set_up`; the device must break for `reason` and recover.
fn refuses(set_up: impl FnOnce(&mut Driver), reason: &str) {
    let mut driver = Driver::new();
    driver.start_completing();
    set_up(&mut driver);
    if driver.avail_idx == 0 {
        driver.make_available(0);
    }
    driver.vq.service();
    assert_eq!(driver.broken(), format!("requestq: {reason}"));
    assert_eq!(*driver.reasons.lock().unwrap(), [driver.broken()]);
    assert_eq!(driver.config_vector.irqfd.take(), 1);
    stays_broken(&mut driver);
    recovers(driver);
}

fn stays_broken(driver: &mut Driver) {
    let served = driver.used().len();
    driver.add(1);
    driver.vq.notify();
    assert!(driver.vq.pop().is_none());
    assert_eq!((served, driver.used().len()), (0, 0));
}

fn recovers(mut driver: Driver) {
    driver.vq.stop();
    driver.state.reset();
    driver.store(AVAIL + 2, 0);
    driver.avail_idx = 0;
    driver.start_completing();
    driver.add(1);
    driver.vq.notify();
    assert_eq!(driver.used(), [(1, 0)]);
    assert_eq!(driver.state.broken(), None);
}

fn refuses_table(length: u32, flags: u16, reason: &str) {
    refuses(|driver| driver.desc(0, TABLE, length, flags, 1), reason);
}

#[test]
fn a_loop() {
    refuses(
        |driver| {
            driver.desc(0, BUFFERS, 1, NEXT, 1);
            driver.desc(1, BUFFERS, 1, NEXT, 0);
        },
        "head 0: the chain is longer than the queue (8 entries)",
    );
}

#[test]
fn a_next_descriptor_past_the_table() {
    refuses(|driver| driver.desc(0, BUFFERS, 1, NEXT, SIZE), "head 0: next 8 is past the descriptor table (8 entries)");
}

#[test]
fn a_head_past_the_table() {
    refuses(|driver| driver.make_available(9), "head 9 is past the descriptor table (8 entries)");
}

#[test]
fn a_descriptor_of_all_ones() {
    refuses(
        |driver| driver.desc(0, u64::MAX, u32::MAX, u16::MAX, u16::MAX),
        "head 0: descriptor 0: an indirect table with a next descriptor",
    );
}

#[test]
fn a_chain_of_more_than_32_bits() {
    refuses(
        |driver| {
            let memory = pyvirtio_core::GuestMemory::allocate(&[(0, 3 << 30)]).unwrap();
            driver.vq.stop();
            driver.memory = memory;
            driver.start_completing();
            driver.desc(0, 0, 1 << 31, NEXT, 1);
            driver.desc(1, 0, 1 << 31, NEXT, 2);
            driver.desc(2, 0, 1, 0, 0);
        },
        "head 0: descriptor 1: 2147483648 bytes more make the chain longer than 2^32 - 1",
    );
}

#[test]
fn a_buffer_outside_ram() {
    for (address, length) in [(END - 1, 2), (END, 1), (u64::MAX - 1, 4), (1 << 40, u32::MAX)] {
        refuses(
            |driver| driver.desc(0, address, length, WRITE, 0),
            &format!("head 0: descriptor 0: {length} bytes at {address:#x} are not guest memory"),
        );
    }
}

#[test]
fn a_readable_buffer_after_a_writable_one() {
    refuses(
        |driver| {
            driver.desc(0, BUFFERS, 1, WRITE | NEXT, 1);
            driver.desc(1, BUFFERS, 1, 0, 0);
        },
        "head 0: descriptor 1: a device-readable buffer after a device-writable one",
    );
}

#[test]
fn a_buffer_over_the_ring_itself_is_only_memory() {
    let mut driver = Driver::new();
    driver.start(|vq| {
        while let Some(mut chain) = vq.pop() {
            chain.write(&[0xff; 4096]).unwrap();
            chain.complete().unwrap();
        }
    });
    driver.desc(0, DESC, 3 * 4096, WRITE, 0);
    driver.make_available(0);
    driver.vq.notify();
    driver.vq.notify();
    assert_eq!(driver.used(), [(0, 4096)]);
}

#[test]
fn an_indirect_table_without_the_feature() {
    let mut driver = Driver::with(|config| config.indirect = false);
    driver.start_completing();
    driver.desc(0, TABLE, 16, INDIRECT, 0);
    driver.make_available(0);
    driver.vq.notify();
    let reason = "requestq: head 0: descriptor 0: an indirect table without VIRTIO_F_INDIRECT_DESC";
    assert_eq!(driver.broken(), reason);
}

#[test]
fn a_table_that_is_none() {
    let next = "head 0: descriptor 0: an indirect table with a next descriptor";
    refuses_table(16, INDIRECT | NEXT, next);
    refuses_table(0, INDIRECT, "head 0: descriptor 0: an indirect table of 0 bytes (a multiple of 16)");
    refuses_table(24, INDIRECT, "head 0: descriptor 0: an indirect table of 24 bytes (a multiple of 16)");
    refuses_table(9 * 16, INDIRECT, "head 0: descriptor 0: an indirect table of 9 entries (at most 8)");
}

#[test]
fn a_table_outside_ram() {
    refuses(
        |driver| driver.desc(0, END - 16, 32, INDIRECT, 0),
        &format!("head 0: descriptor 0: 32 bytes at {:#x} are not guest memory", END - 16),
    );
}

#[test]
fn a_table_inside_a_table() {
    refuses(
        |driver| {
            driver.desc(0, TABLE, 32, INDIRECT, 0);
            driver.desc_in(TABLE, 0, TABLE, 16, INDIRECT, 0);
        },
        "head 0: indirect descriptor 0: a table inside a table",
    );
}

#[test]
fn a_loop_in_a_table() {
    refuses(
        |driver| {
            driver.desc(0, TABLE, 32, INDIRECT, 0);
            driver.desc_in(TABLE, 0, BUFFERS, 1, NEXT, 0);
        },
        "head 0: the indirect chain is longer than its table (2 entries)",
    );
}

#[test]
fn a_next_descriptor_past_an_indirect_table() {
    refuses(
        |driver| {
            driver.desc(0, TABLE, 32, INDIRECT, 0);
            driver.desc_in(TABLE, 0, BUFFERS, 1, NEXT, 2);
        },
        "head 0: indirect next 2 is past its table (2 entries)",
    );
}

#[test]
fn an_avail_index_that_jumps() {
    refuses(
        |driver| {
            driver.avail_idx = SIZE + 1;
            driver.store(AVAIL + 2, SIZE + 1);
        },
        "the avail index is 9 entries ahead (the queue has 8)",
    );
}

#[test]
fn an_avail_index_that_goes_backwards() {
    refuses(
        |driver| {
            driver.avail_idx = u16::MAX;
            driver.store(AVAIL + 2, u16::MAX);
        },
        "the avail index is 65535 entries ahead (the queue has 8)",
    );
}

#[test]
fn more_chains_than_the_queue_can_hold() {
    let mut driver = Driver::new();
    let mut held = Vec::new();
    for _ in 0..SIZE {
        driver.add(0);
        held.push(driver.pop().unwrap());
    }
    driver.add(0);
    assert!(driver.pop().is_none());
    assert_eq!(driver.broken(), "requestq: more chains in flight than the queue has entries (8)");
}

#[test]
fn one_head_twice_is_served_twice() {
    let mut driver = Driver::new();
    driver.start_completing();
    driver.add(0);
    driver.make_available(0);
    driver.vq.notify();
    assert_eq!(driver.used(), [(0, 0), (0, 0)]);
}

#[test]
fn the_indexes_wrap() {
    let mut driver = Driver::with(|config| (config.next_avail, config.next_used) = (u16::MAX - 1, u16::MAX - 1));
    driver.start_completing();
    for head in 0..4 {
        driver.add(head);
    }
    driver.vq.notify();
    assert_eq!(driver.used(), [(0, 0), (1, 0), (2, 0), (3, 0)]);
    assert_eq!(driver.vq.stop(), (2, 2));
}

#[test]
fn a_scribbled_used_ring_changes_nothing() {
    let mut driver = Driver::new();
    driver.start_completing();
    driver.memory.write(USED, &[0xff; 70]).unwrap();
    driver.add(3);
    driver.vq.notify();
    assert_eq!(driver.load(USED + 2), 1);
    assert_eq!(driver.used(), [(3, 0)]);
}

#[test]
fn rings_that_cannot_be_are_refused() {
    type Spoil = fn(&mut RingConfig);
    let cases: [(Spoil, &str); 10] = [
        (|c| c.size = 0, "0 entries (a power of two up to 256)"),
        (|c| c.size = 12, "12 entries (a power of two up to 256)"),
        (|c| c.size = 512, "512 entries (a power of two up to 256)"),
        (|c| c.desc += 8, "the descriptor table at 0x1008 is not a multiple of 16"),
        (|c| c.avail += 1, "the avail ring at 0x2001 is not a multiple of 2"),
        (|c| c.used += 2, "the used ring at 0x3002 is not a multiple of 4"),
        (|c| c.avail = c.desc + 0x70, "the descriptor table at 0x1000 and the avail ring at 0x1070 overlap"),
        (|c| c.used = c.avail, "the avail ring at 0x2000 and the used ring at 0x2000 overlap"),
        (|c| c.used = END - 4, "70 bytes at 0x1ffffc are not guest memory"),
        (|c| c.desc = u64::MAX - 15, "the descriptor table at 0xfffffffffffffff0 passes the end of the address space"),
    ];
    for (spoil, reason) in cases {
        let driver = Driver::with(spoil);
        let handler = std::sync::Arc::new(Closure(|_: &_| ()));
        let error = driver.vq.start(driver.memory.clone(), &driver.config, handler).unwrap_err();
        assert_eq!(error.0, format!("requestq: {reason}"));
        assert_eq!(driver.vq.size(), 0);
    }
}
