//! `Completed`, and a tap that is written in Python.

use pyo3::prelude::*;
use pyvirtio_core::Tap;

use crate::logging;

/// A chain that its handler completed and that the driver has not got back.
#[pyclass(frozen, skip_from_py_object, module = "pyvirtio._core")]
#[derive(Clone, Copy)]
pub struct Completed(pub pyvirtio_core::Completed);

#[pymethods]
impl Completed {
    #[getter]
    fn head(&self) -> u16 {
        self.0.head()
    }

    #[getter]
    fn length(&self) -> u32 {
        self.0.length()
    }

    fn resized(&self, length: u32) -> Self {
        Self(self.0.resized(length))
    }
}

/// Attaches once for each batch.
pub struct PythonTap(pub Py<PyAny>);

impl Tap for PythonTap {
    fn completed(&self, batch: Vec<pyvirtio_core::Completed>) {
        Python::attach(|py| {
            let batch: Vec<Completed> = batch.into_iter().map(Completed).collect();
            if let Err(error) = self.0.call1(py, (batch,)) {
                logging::exception(py, "exception in a tap", &error);
            }
        });
    }
}
