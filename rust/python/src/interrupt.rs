//! `IrqLine`, `Isr`, `MsixVector`.

use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;

use pyo3::exceptions::PyAttributeError;
use pyo3::prelude::*;
use pyvirtio_core::interrupt::{self, EventLine, Interrupt, Line};
use pyvirtio_core::sync::EventFd;

use crate::errors::os_error;

#[pyclass(frozen, module = "pyvirtio._core")]
pub struct IrqLine {
    pub inner: Arc<interrupt::IrqLine>,
    /// Of a line that only remembers its level.
    remembered: Option<Arc<EventLine>>,
}

impl IrqLine {
    /// A line that drives `out`, which somebody else implements.
    pub fn over(out: Arc<dyn Line>) -> Self {
        Self { inner: Arc::new(interrupt::IrqLine::new(out)), remembered: None }
    }
}

#[pymethods]
impl IrqLine {
    #[new]
    fn new() -> PyResult<Self> {
        let line = Arc::new(EventLine { rose: EventFd::new().map_err(os_error)? });
        Ok(Self { inner: Arc::new(interrupt::IrqLine::new(line.clone())), remembered: Some(line) })
    }

    #[getter]
    fn level(&self) -> bool {
        self.inner.level()
    }

    #[getter]
    fn fd(&self) -> PyResult<RawFd> {
        let line = self.remembered.as_ref().ok_or_else(|| PyAttributeError::new_err("a line of KVM has no fd"))?;
        Ok(line.rose.as_raw_fd())
    }

    fn set(&self, level: bool) {
        self.inner.set(level);
    }

    fn share(&self) -> Self {
        Self { inner: Arc::new(self.inner.share()), remembered: self.remembered.clone() }
    }
}

#[pyclass(frozen, module = "pyvirtio._core")]
pub struct Isr {
    pub inner: Arc<interrupt::Isr>,
}

#[pymethods]
impl Isr {
    #[new]
    fn new(line: &IrqLine) -> Self {
        Self { inner: Arc::new(interrupt::Isr::new(line.inner.clone())) }
    }

    #[getter]
    fn intx_enabled(&self) -> bool {
        self.inner.intx_enabled()
    }

    #[setter]
    fn set_intx_enabled(&self, enabled: bool) {
        self.inner.set_intx_enabled(enabled);
    }

    fn read(&self) -> u8 {
        self.inner.read()
    }

    fn peek(&self) -> u8 {
        self.inner.peek()
    }

    fn post(&self, bits: u8) {
        self.inner.post(bits);
    }
}

#[pyclass(frozen, module = "pyvirtio._core")]
pub struct MsixVector {
    pub inner: Arc<interrupt::MsixVector>,
}

#[pymethods]
impl MsixVector {
    #[new]
    fn new() -> PyResult<Self> {
        interrupt::MsixVector::new().map(|inner| Self { inner: Arc::new(inner) }).map_err(os_error)
    }

    #[getter]
    fn fd(&self) -> RawFd {
        self.inner.irqfd.as_raw_fd()
    }

    #[getter]
    fn masked(&self) -> bool {
        self.inner.masked()
    }

    #[setter]
    fn set_masked(&self, masked: bool) {
        self.inner.set_masked(masked);
    }

    #[getter]
    fn pending(&self) -> bool {
        self.inner.pending()
    }

    #[setter]
    fn set_pending(&self, pending: bool) {
        self.inner.set_pending(pending);
    }

    fn signal(&self) {
        self.inner.signal();
    }
}

#[pyclass(frozen, module = "pyvirtio._core")]
pub struct CallFd {
    pub inner: Arc<interrupt::CallFd>,
}

#[pymethods]
impl CallFd {
    #[new]
    fn new(fd: RawFd) -> PyResult<Self> {
        interrupt::CallFd::new(fd).map(|inner| Self { inner: Arc::new(inner) }).map_err(os_error)
    }

    /// Without the interpreter: a front-end may have made what it shares with us block again.
    fn signal(&self, py: Python<'_>) {
        py.detach(|| self.inner.signal());
    }

    fn let_go(&self, py: Python<'_>) {
        py.detach(|| self.inner.let_go());
    }
}

/// What a queue or a device signals.
pub fn interrupt(isr: &Isr, bits: u8, vector: Option<&MsixVector>) -> Interrupt {
    Interrupt::Pci { isr: isr.inner.clone(), bits, vector: vector.map(|vector| vector.inner.clone()) }
}
