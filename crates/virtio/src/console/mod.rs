//! virtio-console (5.3): a console for the guest (`/dev/hvc0`) and named byte streams (`/dev/virtio-ports/NAME`).

mod device;
mod spec;
#[cfg(test)]
mod test;

pub use device::{CONSOLE_PORT, Console, ConsoleDevice};
