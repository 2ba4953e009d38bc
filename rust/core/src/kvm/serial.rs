//! A 16550 serial port whose output goes to a file descriptor.

use std::convert::Infallible;
use std::io::{self, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::{Arc, Mutex};

use vm_superio::serial::NoEvents;
use vm_superio::{SerialState, Trigger};

use super::{During, Error, Result};
use crate::interrupt::IrqLine;

/// How long a byte may wait for a reader of the output before bytes are dropped.
const PATIENCE_MS: i32 = 100;

/// The serial port. Any thread.
///
/// Its interrupt is a pulse: guests program the ISA pins as edge-triggered.
pub struct Serial(Mutex<vm_superio::Serial<Pulse, NoEvents, Output>>);

impl Serial {
    pub fn new(line: Arc<IrqLine>, out: OwnedFd) -> Serial {
        Serial(Mutex::new(vm_superio::Serial::new(Pulse(line), Output { fd: out, stuck: false })))
    }

    pub fn read(&self, register: u8) -> u8 {
        self.0.lock().unwrap().read(register)
    }

    pub fn write(&self, register: u8, value: u8) {
        // An error is a byte that nobody reads; the guest has no use for it.
        let _ = self.0.lock().unwrap().write(register, value);
    }

    /// Queue input for the guest; returns how many bytes the FIFO took.
    pub fn receive(&self, data: &[u8]) -> usize {
        let mut port = self.0.lock().unwrap();
        let taken = data.len().min(port.fifo_capacity());
        if taken == 0 {
            // A pulse is lost while the guest has the pin masked; one too many does no harm.
            let _ = port.interrupt_evt().trigger();
        }
        port.enqueue_raw_bytes(&data[..taken]).unwrap_or(0)
    }

    /// Its registers, then what is in the FIFO, in a form for another process.
    pub fn save(&self) -> Vec<u8> {
        let mut state = self.0.lock().unwrap().state();
        let mut bytes: Vec<u8> = registers(&mut state).map(|register| *register).into();
        bytes.append(&mut state.in_buffer);
        bytes
    }

    /// Go on from `save`; an interrupt that may have been under way is sent again.
    pub fn restore(&self, bytes: &[u8]) -> Result<()> {
        let mut state = SerialState::default();
        let refused = || Error::Guest(format!("the state has {} bytes of a serial port", bytes.len()));
        let (values, fifo) = bytes.split_first_chunk::<REGISTERS>().ok_or_else(refused)?;
        for (register, value) in registers(&mut state).into_iter().zip(values) {
            *register = *value;
        }
        state.in_buffer = fifo.to_vec();
        let mut port = self.0.lock().unwrap();
        let pulse = port.interrupt_evt().clone();
        let out = Output { fd: port.writer().fd.try_clone().during("dup")?, stuck: false };
        *port = vm_superio::Serial::from_state(&state, pulse, NoEvents, out).map_err(|_| refused())?;
        Ok(())
    }
}

const REGISTERS: usize = 9;

fn registers(state: &mut SerialState) -> [&mut u8; REGISTERS] {
    [
        &mut state.baud_divisor_low,
        &mut state.baud_divisor_high,
        &mut state.interrupt_enable,
        &mut state.interrupt_identification,
        &mut state.line_control,
        &mut state.line_status,
        &mut state.modem_control,
        &mut state.modem_status,
        &mut state.scratch,
    ]
}

#[derive(Clone)]
struct Pulse(Arc<IrqLine>);

impl Trigger for Pulse {
    type E = Infallible;

    fn trigger(&self) -> std::result::Result<(), Infallible> {
        self.0.set(true);
        self.0.set(false);
        Ok(())
    }
}

/// Writes single bytes, and waits for a slow reader only once: after that, bytes are dropped until it reads again.
///
/// The descriptor may be shared with other programs (a terminal), so it cannot be made non-blocking. A byte
/// written after POLLOUT does not block.
struct Output {
    fd: OwnedFd,
    stuck: bool,
}

impl Output {
    fn writable(&mut self) -> bool {
        let patience = if self.stuck { 0 } else { PATIENCE_MS };
        let mut poll = libc::pollfd { fd: self.fd.as_raw_fd(), events: libc::POLLOUT, revents: 0 };
        // SAFETY: one pollfd, for the time of the call.
        let ready = unsafe { libc::poll(&mut poll, 1, patience) };
        self.stuck = ready != 1;
        ready == 1
    }
}

impl Write for Output {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        for byte in data {
            if self.writable() {
                // SAFETY: one readable byte. A failure is a reader that is gone.
                unsafe { libc::write(self.fd.as_raw_fd(), std::ptr::from_ref(byte).cast(), 1) };
            }
        }
        Ok(data.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
