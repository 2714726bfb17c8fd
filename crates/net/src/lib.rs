//! Networks for guests: what carries the frames of their cards.
//!
//! What lives here: frames with their offloads ([`Batch`], [`Offload`], [`segment`]), the [`Card`] they come from, and what they are
//! carried by: the user-mode [`gateway`], and [`tap`]s; a [`watch`] shows them to people.
//! Usable alone: this crate knows no VM. What may enter: nothing of yado.
//!
//! Guests are hostile: no frame of any content may cause a panic, an endless loop, or memory without bound.
//!
//! Lock order: none here; a [`Card`] is called with no lock held.
#![deny(unsafe_code)]
#![cfg_attr(
    not(test),
    deny(
        clippy::unwrap_used,
        clippy::expect_used,
        clippy::panic,
        clippy::indexing_slicing,
        clippy::arithmetic_side_effects
    )
)]

mod batch;
mod card;
pub mod gateway;
pub mod offload;
pub mod segment;
pub mod switch;
mod sys;
pub mod tap;
pub mod vhost;
pub mod vxlan;
pub mod watch;
mod wire;

pub use batch::{Batch, FRAME_MAX, FRAME_MIN};
pub use card::{Bell, Card};
pub use offload::{Checksum, Offload};
pub use wire::layers::{Flow, flow, flow_hash};
