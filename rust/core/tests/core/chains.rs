use pyvirtio_core::ChainError;

use crate::driver::{Driver, BORDER, BUFFERS, INDIRECT, NEXT, TABLE, WRITE};

#[test]
fn a_chain_reads_and_writes_across_its_descriptors() {
    let mut driver = Driver::new();
    driver.memory.write(BUFFERS, b"hello, world").unwrap();
    driver.desc(0, BUFFERS, 5, NEXT, 3);
    driver.desc(3, BUFFERS + 5, 7, NEXT, 1);
    driver.desc(1, BUFFERS + 0x100, 2, WRITE | NEXT, 2);
    driver.desc(2, BUFFERS + 0x200, 4, WRITE, 0);
    driver.make_available(0);
    let mut chain = driver.pop().unwrap();
    assert_eq!((chain.readable_left(), chain.writable_left()), (12, 6));
    let mut text = [0; 8];
    assert_eq!(chain.read(&mut text), Ok(8));
    assert_eq!(&text, b"hello, w");
    assert_eq!(chain.write(b"abc"), Ok(3));
    assert_eq!(chain.write(b"defgh"), Ok(3));
    assert_eq!((chain.readable_left(), chain.writable_left()), (4, 0));
    chain.complete().unwrap();
    assert_eq!(driver.used(), [(0, 6)]);
    let mut written = [0; 4];
    driver.memory.read(BUFFERS + 0x200, &mut written).unwrap();
    assert_eq!(&written, b"cdef");
}

#[test]
fn the_used_length_is_what_was_written() {
    let mut driver = Driver::new();
    driver.add(0);
    let mut chain = driver.pop().unwrap();
    chain.write(b"abc").unwrap();
    chain.complete().unwrap();
    assert_eq!(driver.used(), [(0, 3)]);
}

#[test]
fn an_indirect_table_may_follow_direct_descriptors_and_cross_a_region() {
    let mut driver = Driver::new();
    let table = BORDER - 24;
    driver.desc(0, BUFFERS, 1, NEXT, 1);
    driver.desc(1, table, 48, INDIRECT | WRITE, 7);
    driver.desc_in(table, 0, BUFFERS + 1, 2, NEXT, 2);
    driver.desc_in(table, 2, BORDER - 4, 8, WRITE, 0);
    driver.make_available(0);
    let mut chain = driver.pop().unwrap();
    assert_eq!((chain.readable_left(), chain.writable_left()), (3, 8));
    assert_eq!(chain.take_writable(usize::MAX).iter().map(|piece| piece.iov_len).collect::<Vec<_>>(), [4, 4]);
    chain.complete().unwrap();
}

#[test]
fn empty_descriptors_are_passed_over() {
    let mut driver = Driver::new();
    driver.desc(0, 1 << 40, 0, NEXT, 1);
    driver.desc(1, BUFFERS, 4, WRITE | NEXT, 2);
    driver.desc(2, 0, 0, WRITE, 0);
    driver.make_available(0);
    let mut chain = driver.pop().unwrap();
    assert_eq!((chain.readable_left(), chain.writable_left()), (0, 4));
    assert_eq!(chain.write(b"12345"), Ok(4));
    chain.complete().unwrap();
}

#[test]
fn a_chain_rewritten_in_flight_keeps_what_was_popped() {
    let mut driver = Driver::new();
    driver.add(0);
    let mut chain = driver.pop().unwrap();
    driver.desc(0, 1 << 40, u32::MAX, INDIRECT, 9);
    assert_eq!(chain.write(&[1; 32]), Ok(16));
    chain.complete().unwrap();
    assert_eq!(driver.used(), [(0, 16)]);
}

#[test]
fn a_chain_is_completed_once() {
    let mut driver = Driver::new();
    driver.add(0);
    let mut chain = driver.pop().unwrap();
    chain.complete().unwrap();
    assert_eq!(chain.complete(), Err(ChainError::Completed));
    assert_eq!(driver.used(), [(0, 0)]);
}

#[test]
fn chains_may_be_completed_in_any_order() {
    let mut driver = Driver::new();
    driver.add(0);
    driver.add(1);
    let (mut first, mut second) = (driver.pop().unwrap(), driver.pop().unwrap());
    assert_eq!(driver.vq.in_flight(), 2);
    second.complete().unwrap();
    first.complete().unwrap();
    assert_eq!(driver.used(), [(1, 0), (0, 0)]);
    assert_eq!(driver.vq.in_flight(), 0);
}

#[test]
fn a_chain_is_stale_after_a_reset() {
    let mut driver = Driver::new();
    driver.add(0);
    let mut chain = driver.pop().unwrap();
    driver.vq.stop();
    driver.state.reset();
    driver.start_completing();
    assert_eq!(chain.read(&mut [0]), Err(ChainError::Stale));
    assert_eq!(chain.write(b"x"), Err(ChainError::Stale));
    assert_eq!(chain.complete(), Err(ChainError::Stale));
    drop(chain);
    assert_eq!(driver.state.broken(), None);
    assert_eq!(driver.load(crate::driver::USED + 2), 0);
}

#[test]
fn a_reset_alone_makes_chains_stale() {
    let mut driver = Driver::new();
    driver.add(0);
    let chain = driver.pop().unwrap();
    driver.state.reset();
    assert_eq!(chain.check_live(), Err(ChainError::Stale));
}

#[test]
fn a_chain_dropped_without_complete_breaks_the_device() {
    let mut driver = Driver::new();
    driver.add(0);
    drop(driver.pop());
    assert_eq!(driver.broken(), "requestq: the handler dropped chain 0 without complete(); each has to be completed");
    assert_eq!(driver.config_vector.irqfd.take(), 1);
}

#[test]
fn a_chain_may_fill_the_queue_and_no_more() {
    let mut driver = Driver::new();
    for entry in 0..8 {
        driver.desc_in(TABLE, entry, BUFFERS, 1, if entry < 7 { NEXT | WRITE } else { WRITE }, entry + 1);
    }
    driver.desc(0, TABLE, 8 * 16, INDIRECT, 0);
    driver.make_available(0);
    let mut chain = driver.pop().unwrap();
    assert_eq!(chain.writable_left(), 8);
    chain.complete().unwrap();
}
