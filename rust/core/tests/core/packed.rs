//! The packed ring as a driver sees it: chains, kicks, interrupts, and where it goes on after a stop.

use pyvirtio_core::ChainError;

use crate::driver::{BORDER, BUFFERS, INDIRECT, SIZE, TABLE, WRITE};
use crate::packed_driver::{PackedDriver, Place, AT_DESC, AVAILABLE, DISABLE, FRESH, IS_USED};

fn event_idx() -> PackedDriver {
    PackedDriver::with(|config| config.event_idx = true)
}

fn at(index: u16, wrap: bool) -> Place {
    Place { index, wrap }
}

#[test]
fn a_chain_reads_and_writes_across_its_descriptors() {
    let mut driver = PackedDriver::new();
    driver.memory.write(BUFFERS, b"hello, world").unwrap();
    let parts = [(BUFFERS, 5, 0), (BUFFERS + 5, 7, 0), (BUFFERS + 0x100, 2, WRITE), (BUFFERS + 0x200, 4, WRITE)];
    driver.chain(&parts, 5);
    let mut chain = driver.pop().unwrap();
    assert_eq!((chain.head(), chain.readable_left(), chain.writable_left()), (5, 12, 6));
    let mut text = [0; 12];
    chain.read(&mut text).unwrap();
    assert_eq!(&text, b"hello, world");
    assert_eq!(chain.write(b"abcde"), Ok(5));
    chain.complete().unwrap();
    assert_eq!(driver.used(), [(5, 5)]);
    assert_eq!(driver.flags(0), AVAILABLE | IS_USED | WRITE);
    assert_eq!(driver.vq.stop(), (4 | FRESH, 4 | FRESH));
}

#[test]
fn an_indirect_table_is_one_descriptor_whose_entries_follow_each_other() {
    let mut driver = PackedDriver::new();
    let table = BORDER - 24;
    driver.desc_in(table, 0, BUFFERS, 1, 0, 0);
    driver.desc_in(table, 1, BUFFERS + 1, 2, 9, !(INDIRECT | WRITE));
    driver.desc_in(table, 2, BORDER - 4, 8, 9, WRITE);
    driver.chain(&[(table, 48, INDIRECT | WRITE)], 7);
    let mut chain = driver.pop().unwrap();
    assert_eq!((chain.head(), chain.readable_left(), chain.writable_left()), (7, 3, 8));
    chain.complete().unwrap();
    assert_eq!(driver.used(), [(7, 0)]);
    assert_eq!(driver.flags(0), AVAILABLE | IS_USED);
}

#[test]
fn the_ring_wraps_with_chains_across_its_end() {
    for size in [8, 7, 5, 3] {
        let mut driver = PackedDriver::with(|config| config.size = size);
        driver.start_completing();
        for round in 0..50 {
            let id = round % size;
            driver.chain(&[(BUFFERS, 1, 0), (BUFFERS, 1, 0)], id);
            driver.vq.notify();
            assert_eq!(driver.used(), [(id, 0)]);
        }
        assert_eq!(driver.state.broken(), None);
    }
}

#[test]
fn a_chain_may_fill_the_ring() {
    let mut driver = PackedDriver::new();
    driver.start_completing();
    for id in 0..4 {
        driver.chain(&[(BUFFERS, 1, WRITE); SIZE as usize], id);
        driver.vq.notify();
        assert_eq!(driver.used(), [(id, 0)]);
    }
}

#[test]
fn a_ring_of_one_entry_works() {
    let mut driver = PackedDriver::with(|config| config.size = 1);
    driver.start_completing();
    for _ in 0..5 {
        driver.add(0);
        driver.vq.notify();
        assert_eq!(driver.used(), [(0, 0)]);
    }
}

#[test]
fn chains_may_be_completed_in_any_order() {
    let mut driver = PackedDriver::new();
    for id in [4, 2, 7] {
        driver.add(id);
    }
    let mut chains: Vec<_> = (0..3).map(|_| driver.pop().unwrap()).collect();
    for n in [2, 0, 1] {
        chains[n].complete().unwrap();
    }
    assert_eq!(driver.used(), [(7, 0), (4, 0), (2, 0)]);
    assert_eq!(driver.vq.in_flight(), 0);
}

#[test]
fn in_order_holds_back_what_is_completed_too_early() {
    for packed in [false, true] {
        let mut driver = PackedDriver::with(|config| {
            config.in_order = true;
            if !packed {
                (config.packed, config.next_avail, config.next_used) = (false, 0, 0);
            }
        });
        for id in 0..3 {
            if packed {
                driver.add(id);
            } else {
                crate::driver::Driver::add(&mut driver, id);
            }
        }
        let mut chains: Vec<_> = (0..3).map(|_| driver.pop().unwrap()).collect();
        let used = |driver: &mut PackedDriver| match packed {
            true => driver.used().iter().map(|used| u32::from(used.0)).collect::<Vec<_>>(),
            false => crate::driver::Driver::used(driver).iter().map(|used| used.0).collect(),
        };
        chains[2].complete().unwrap();
        assert_eq!((used(&mut driver), driver.vq.in_flight(), driver.interrupts()), (vec![], 3, 0));
        chains[0].complete().unwrap();
        assert_eq!((used(&mut driver), driver.vq.in_flight(), driver.interrupts()), (vec![0], 2, 1));
        chains[1].complete().unwrap();
        assert_eq!((used(&mut driver), driver.vq.in_flight(), driver.interrupts()), (vec![1, 2], 0, 1));
    }
}

#[test]
fn in_order_one_used_descriptor_stands_for_buffers_that_were_used_whole() {
    let mut driver = PackedDriver::with(|config| config.in_order = true);
    driver.start(|vq| {
        while let Some(mut chain) = vq.pop() {
            let short = chain.head() == 3;
            chain.write(&[1; 16][..if short { 15 } else { 16 }]).unwrap();
            chain.complete().unwrap();
        }
    });
    for id in 0..6 {
        driver.add(id);
    }
    driver.vq.notify();
    // 0 to 2 are told of by 3, which is not whole; 4 by 5, where the next batch of the device stands.
    let words: Vec<_> = [0, 4].map(|index| driver.load(crate::driver::DESC + 16 * index + 12)).to_vec();
    assert_eq!(words, [3, 5]);
    assert_eq!([0, 1, 4, 5].map(|index| driver.flags(index) & IS_USED != 0), [true, false, true, false]);
    assert_eq!(driver.vq.stop(), (6 | FRESH, 6 | FRESH));
}

#[test]
fn a_batch_shows_its_first_descriptor_last() {
    let mut driver = PackedDriver::new();
    let memory = driver.memory.clone();
    driver.start(move |vq| {
        let flags = |index: u64| {
            let cell = memory.atomic16(crate::driver::DESC + 16 * index + 14).unwrap();
            cell.load(std::sync::atomic::Ordering::SeqCst)
        };
        while let Some(mut chain) = vq.pop() {
            chain.complete().unwrap();
        }
        assert_eq!([0, 1, 2].map(|index| flags(index) & IS_USED != 0), [false, true, true]);
    });
    (0..3).for_each(|id| driver.add(id));
    driver.vq.notify();
    assert_eq!(driver.used(), [(0, 0), (1, 0), (2, 0)]);
    assert_eq!(driver.interrupts(), 1);
}

#[test]
fn no_interrupt_for_a_driver_that_wants_none() {
    let mut driver = PackedDriver::new();
    driver.start_completing();
    driver.ask(at(0, true), DISABLE);
    driver.add(0);
    driver.vq.notify();
    assert_eq!((driver.used().len(), driver.interrupts()), (1, 0));
    assert_eq!(driver.vq.counters.suppressed.get(), 1);
}

#[test]
fn an_interrupt_when_the_descriptor_event_is_passed() {
    let mut driver = event_idx();
    driver.start_completing();
    let mut interrupts = Vec::new();
    // The event lies in the second lap, at its fourth descriptor.
    driver.ask(at(3, false), AT_DESC);
    for round in 0..16 {
        driver.add(round % SIZE);
        driver.vq.notify();
        assert_eq!(driver.used().len(), 1);
        interrupts.push(driver.interrupts());
    }
    assert_eq!(interrupts, [1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0]);
}

#[test]
fn an_event_inside_a_chain_is_passed_with_the_chain() {
    let mut driver = event_idx();
    driver.start_completing();
    driver.add(0);
    driver.vq.notify();
    assert_eq!(driver.interrupts(), 1);
    driver.ask(at(2, true), AT_DESC);
    driver.chain(&[(BUFFERS, 1, 0); 3], 1);
    driver.vq.notify();
    assert_eq!(driver.interrupts(), 1);
}

#[test]
fn events_that_are_none_cost_at_most_interrupts() {
    for (event_idx, flags, index) in [(false, AT_DESC, 0), (true, 3, 0), (false, 0xfffc, 0), (true, AT_DESC, SIZE)] {
        let mut driver = PackedDriver::with(|config| config.event_idx = event_idx);
        driver.start_completing();
        driver.ask(at(index, true), flags);
        for id in 0..3 {
            driver.add(id);
            driver.vq.notify();
            assert_eq!((driver.used().len(), driver.interrupts()), (1, 1));
        }
    }
}

#[test]
fn kicks_are_suppressed_while_the_handler_runs() {
    let mut driver = PackedDriver::new();
    let memory = driver.memory.clone();
    driver.start(move |vq| {
        let flags = memory.atomic16(crate::driver::USED + 2).unwrap();
        assert_eq!(flags.load(std::sync::atomic::Ordering::SeqCst), DISABLE);
        while let Some(mut chain) = vq.pop() {
            chain.complete().unwrap();
        }
    });
    driver.add(0);
    driver.vq.notify();
    assert_eq!((driver.used().len(), driver.asked().1), (1, 0));
}

#[test]
fn kicks_are_asked_for_at_the_descriptor_that_comes_next() {
    let mut driver = event_idx();
    driver.start_completing();
    (0..2).for_each(|id| driver.add(id));
    driver.vq.notify();
    assert_eq!(driver.asked(), (at(2, true), AT_DESC));
    (2..8).for_each(|id| driver.add(id));
    driver.vq.notify();
    assert_eq!(driver.asked(), (at(0, false), AT_DESC));
}

#[test]
fn kicks_are_asked_for_beyond_what_the_handler_left() {
    let mut driver = event_idx();
    driver.start(|_| ());
    driver.chain(&[(BUFFERS, 1, 0); 3], 0);
    driver.add(1);
    driver.vq.notify();
    assert_eq!(driver.asked(), (at(4, true), AT_DESC));
    assert!(!driver.vq.has_work());
    driver.add(2);
    assert!(driver.vq.has_work());
}

#[test]
fn what_somebody_else_took_is_news_all_the_same() {
    let mut driver = event_idx();
    driver.start(|_| ());
    driver.add(0);
    driver.vq.notify();
    driver.vq.pop().unwrap().complete().unwrap();
    driver.add(1);
    driver.vq.pop().unwrap().complete().unwrap();
    assert!(driver.vq.rearm());
    assert_eq!(driver.used(), [(0, 0), (1, 0)]);
}

#[test]
fn the_position_survives_a_stop_and_a_start() {
    let mut driver = PackedDriver::new();
    driver.start_completing();
    for round in 0..11 {
        driver.add(round % SIZE);
        driver.vq.notify();
        assert_eq!(driver.used().len(), 1);
        let position = driver.vq.stop();
        assert_eq!(position, (driver.next.encoded(), driver.next.encoded()));
        (driver.config.next_avail, driver.config.next_used) = position;
        driver.start_completing();
    }
}

#[test]
fn a_chain_is_stale_after_a_reset() {
    let mut driver = PackedDriver::new();
    driver.add(0);
    let mut chain = driver.pop().unwrap();
    driver.reset();
    assert_eq!(chain.complete(), Err(ChainError::Stale));
    drop(chain);
    assert_eq!((driver.state.broken(), driver.flags(0)), (None, 0));
}

#[test]
fn a_chain_rewritten_in_flight_keeps_what_was_popped() {
    let mut driver = PackedDriver::new();
    driver.add(3);
    let mut chain = driver.pop().unwrap();
    driver.raw(0, (1 << 40, u32::MAX, INDIRECT), 9);
    assert_eq!(chain.write(&[1; 32]), Ok(16));
    chain.complete().unwrap();
    assert_eq!(driver.used(), [(3, 16)]);
}

#[test]
fn a_table_of_the_largest_size() {
    let mut driver = PackedDriver::new();
    for entry in 0..SIZE {
        driver.desc_in(TABLE, entry, BUFFERS, 1, 0, WRITE);
    }
    driver.chain(&[(TABLE, u32::from(SIZE) * 16, INDIRECT)], 0);
    let mut chain = driver.pop().unwrap();
    assert_eq!(chain.writable_left(), usize::from(SIZE));
    chain.complete().unwrap();
}
