//! `Chain`.

use std::io;

use pyo3::exceptions::{PyRuntimeError, PyValueError};
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::{PyBytes, PyList, PyTuple};
use pyvirtio_core::chain::Segment;
use pyvirtio_core::ChainError;

use crate::buffer::Views;
use crate::bytes::with_bytes;
use crate::errors::{guest_error, os_error, GuestError, StaleChain};

#[pyclass(module = "pyvirtio._core")]
pub struct Chain {
    pub inner: pyvirtio_core::Chain,
}

impl Chain {
    /// A refusal that says which chain of which queue it is about.
    fn refused(&self, error: ChainError) -> PyErr {
        let (vq, head) = (self.inner.vq(), self.inner.head());
        let (device, queue, who) = (vq.state().name(), vq.name(), vq.handler_name());
        let message = format!("{device}: {queue}: chain {head} of {who}: {error}");
        match error {
            ChainError::Stale => StaleChain::new_err(message),
            ChainError::Completed => PyRuntimeError::new_err(message),
        }
    }

    fn discarded(&self, result: Result<io::Result<()>, ChainError>) -> PyResult<()> {
        result.map_err(|error| self.refused(error))?.map_err(os_error)
    }

    fn check_live(&self) -> PyResult<()> {
        self.inner.check_live().map_err(|error| self.refused(error))
    }

    fn lend<'py>(&self, py: Python<'py>, segments: &[Segment], writable: bool) -> PyResult<Bound<'py, PyList>> {
        let views = Views::of(py, self.inner.memory(), segments, writable)?;
        let list = views.list(py);
        views.take_back_later();
        list
    }
}

#[pymethods]
impl Chain {
    #[getter]
    fn head(&self) -> u16 {
        self.inner.head()
    }

    #[getter]
    fn readable(&self) -> PyResult<usize> {
        self.check_live()?;
        Ok(self.inner.readable_left())
    }

    #[getter]
    fn writable(&self) -> PyResult<usize> {
        self.check_live()?;
        Ok(self.inner.writable_left())
    }

    #[pyo3(signature = (length = None))]
    fn read<'py>(&mut self, py: Python<'py>, length: Option<usize>) -> PyResult<Bound<'py, PyBytes>> {
        let length = length.map_or(self.inner.readable_left(), |length| length.min(self.inner.readable_left()));
        PyBytes::new_with(py, length, |out| match self.inner.read(out) {
            Ok(_) => Ok(()),
            Err(error) => Err(self.refused(error)),
        })
    }

    fn unpack<'py>(&mut self, py: Python<'py>, format: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyTuple>> {
        static CALCSIZE: PyOnceLock<Py<PyAny>> = PyOnceLock::new();
        static UNPACK: PyOnceLock<Py<PyAny>> = PyOnceLock::new();
        let size: usize = CALCSIZE.import(py, "struct", "calcsize")?.call1((format,))?.extract()?;
        let left = self.readable()?;
        if size > left {
            return Err(GuestError::new_err(format!("{size} bytes wanted, the chain has {left} left")));
        }
        let bytes = self.read(py, Some(size))?;
        Ok(UNPACK.import(py, "struct", "unpack")?.call1((format, bytes))?.cast_into()?)
    }

    fn write(&mut self, data: &Bound<'_, PyAny>) -> PyResult<usize> {
        with_bytes(data, |data| self.inner.write(data))?.map_err(|error| self.refused(error))
    }

    fn buffers<'py>(&mut self, py: Python<'py>) -> PyResult<(Bound<'py, PyList>, Bound<'py, PyList>)> {
        self.check_live()?;
        if !self.inner.vq().is_server() {
            // Here no reset would wait for who uses them.
            return Err(PyRuntimeError::new_err(
                "buffers() is for the handler while it runs; later use read and write",
            ));
        }
        let (readable, writable) = (self.inner.take_readable(usize::MAX), self.inner.take_writable(usize::MAX));
        Ok((self.lend(py, &readable, false)?, self.lend(py, &writable, true)?))
    }

    fn wrote(&mut self, length: usize) -> PyResult<()> {
        self.check_live()?;
        let most = self.inner.uncounted();
        if length > most {
            return Err(PyValueError::new_err(format!("wrote({length}): buffers() gave room for {most} bytes")));
        }
        self.inner.wrote(length as u32);
        Ok(())
    }

    fn discard(&self, py: Python<'_>, address: u64, length: u64) -> PyResult<()> {
        self.inner.memory().check(address, length).map_err(guest_error)?;
        self.discarded(py.detach(|| self.inner.discard(address, length)))
    }

    fn discard_buffers(&self, py: Python<'_>) -> PyResult<()> {
        self.discarded(py.detach(|| self.inner.discard_writable()))
    }

    fn complete(&mut self, py: Python<'_>) -> PyResult<()> {
        let chain = &mut self.inner;
        // From any other thread the driver is told at once, through a file descriptor that may be a stranger's.
        let done = if chain.vq().is_server() { chain.complete() } else { py.detach(|| chain.complete()) };
        done.map_err(|error| self.refused(error))
    }
}
