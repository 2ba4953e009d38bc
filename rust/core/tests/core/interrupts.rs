use std::sync::Arc;

use pyvirtio_core::interrupt::{EventLine, ISR_CONFIG, ISR_QUEUE};
use pyvirtio_core::sync::EventFd;
use pyvirtio_core::{IrqLine, Isr, MsixVector};

fn line() -> (Arc<IrqLine>, Arc<EventLine>) {
    let out = Arc::new(EventLine { rose: EventFd::new().unwrap() });
    (Arc::new(IrqLine::new(out.clone())), out)
}

#[test]
fn reading_the_isr_clears_it_and_lowers_the_line() {
    let (line, out) = line();
    let isr = Isr::new(line.clone());
    isr.post(ISR_QUEUE);
    isr.post(ISR_CONFIG);
    assert!(line.level());
    assert_eq!(out.rose.take(), 1);
    assert_eq!(isr.read(), 3);
    assert!(!line.level());
    assert_eq!(isr.read(), 0);
}

#[test]
fn the_line_follows_whether_intx_is_enabled() {
    let (line, _) = line();
    let isr = Isr::new(line.clone());
    isr.set_intx_enabled(false);
    isr.post(ISR_QUEUE);
    assert!(!line.level());
    isr.set_intx_enabled(true);
    assert!(line.level());
    isr.set_intx_enabled(false);
    assert!(!line.level());
    assert_eq!(isr.peek(), ISR_QUEUE);
}

#[test]
fn a_shared_line_is_high_while_one_device_holds_it() {
    let (line, out) = line();
    let other = line.share();
    line.set(true);
    other.set(true);
    line.set(false);
    assert!(line.level());
    other.set(false);
    assert!(!line.level());
    assert_eq!(out.rose.take(), 1);
}

#[test]
fn a_device_that_goes_lets_go_of_the_line() {
    let (line, _) = line();
    let other = line.share();
    other.set(true);
    drop(other);
    assert!(!line.level());
}

#[test]
fn a_masked_vector_delivers_when_it_is_unmasked() {
    let vector = MsixVector::new().unwrap();
    vector.set_masked(true);
    vector.signal();
    vector.signal();
    assert!(vector.pending());
    assert_eq!(vector.irqfd.take(), 0);
    vector.set_masked(false);
    assert!(!vector.pending());
    assert_eq!(vector.irqfd.take(), 1);
    vector.signal();
    assert_eq!(vector.irqfd.take(), 1);
}
